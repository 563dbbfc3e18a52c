//! State of a simulated server: its configuration, counters and requests in flight. Responses are decided
//! elsewhere.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    future::Future,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use tokio::{sync::watch, time::Instant};

use super::{
    config::SimConfig,
    encoder::EncoderState,
    ranks::Ranks,
    rendezvous::{peers::Peers, rooms::Rooms},
};

/// Bound on the number of recorded requests.
const MAX_RECORDED_REQUESTS: usize = 1024;
/// Bound on the body bytes of all recorded requests: tests send bodies of several megabytes.
const MAX_RECORDED_BYTES: usize = 64 << 20;

/// A snapshot of a server's counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// HTTP requests whose head has arrived.
    pub requests: u64,
    /// Connections accepted so far.
    pub connections_opened: u64,
    /// Open connections.
    pub connections_open: u64,
    /// Generations in flight.
    pub in_flight: u64,
    /// Generations with a response, also those that were aborted after their first token.
    pub completed: u64,
    /// Requests that would have crashed a real server: lists on a single prompt, a room used twice at the
    /// same time.
    pub crashes: u64,
    /// Decode: prompts that differ from the one that prefill computed.
    pub mismatches: u64,
    /// Generations ended by a client's disconnect or by `/abort_request`.
    pub aborted: u64,
    /// Failed generations, including aborts before the transfer.
    pub failed: u64,
}

/// A recorded request.
#[derive(Clone, Debug)]
pub struct RecordedRequest {
    /// The method.
    pub method: String,
    /// Path and query as sent.
    pub path_and_query: String,
    /// All headers in order, names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Bytes,
    /// The first item's room, if the request generates and names one.
    pub room: Option<i64>,
}

impl RecordedRequest {
    /// The value of a header, by its lower-case name.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(own, _)| own == name).map(|(_, value)| value.as_str())
    }
}

#[derive(Debug, Default)]
struct RecordedRequests {
    list: VecDeque<RecordedRequest>,
    bytes: usize,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub requests: AtomicU64,
    pub connections_opened: AtomicU64,
    pub connections_open: AtomicU64,
    pub completed: AtomicU64,
    pub crashes: AtomicU64,
    pub mismatches: AtomicU64,
    pub aborted: AtomicU64,
    pub failed: AtomicU64,
}

pub(crate) fn bump(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Number of generations in each phase, for `/v1/loads`.
#[derive(Debug, Default)]
pub(crate) struct Gauges {
    pub bootstrap: AtomicI64,
    pub inflight: AtomicI64,
    pub prealloc: AtomicI64,
    pub transfer: AtomicI64,
    pub running: AtomicI64,
}

/// Counts one generation in a gauge until it is dropped.
pub(crate) struct Phase<'a>(&'a AtomicI64);

impl<'a> Phase<'a> {
    pub(crate) fn enter(gauge: &'a AtomicI64) -> Self {
        gauge.fetch_add(1, Ordering::Relaxed);
        Self(gauge)
    }
}

impl Drop for Phase<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Completes when the server is stopped or dropped.
pub(crate) async fn stopped(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

/// One running server.
pub(crate) struct State {
    pub config: SimConfig,
    pub addr: SocketAddr,
    pub bootstrap_port: Option<u16>,
    pub counters: Counters,
    pub gauges: Gauges,
    pub rooms: Rooms,
    pub ranks: Ranks,
    pub peers: Peers,
    pub encoding: EncoderState,
    pub draining: AtomicBool,
    /// When the server was started, which is what its periodic tasks count from.
    pub started: Instant,
    silent: watch::Sender<bool>,
    seen: Mutex<RecordedRequests>,
    live: Mutex<HashMap<String, watch::Sender<bool>>>,
    live_rooms: Mutex<HashSet<i64>>,
    stop: watch::Receiver<bool>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    pub(crate) fn new(
        config: SimConfig,
        addr: SocketAddr,
        bootstrap_port: Option<u16>,
        stop: watch::Receiver<bool>,
    ) -> Self {
        let encoding = EncoderState::new(&config.encoder, &config.encoder_urls);
        Self {
            ranks: Ranks::new(&config),
            config,
            addr,
            bootstrap_port,
            counters: Counters::default(),
            gauges: Gauges::default(),
            rooms: Rooms::default(),
            peers: Peers::default(),
            encoding,
            draining: AtomicBool::new(false),
            started: Instant::now(),
            silent: watch::Sender::new(false),
            seen: Mutex::default(),
            live: Mutex::default(),
            live_rooms: Mutex::default(),
            stop,
        }
    }

    pub(crate) fn port(&self) -> u16 {
        self.addr.port()
    }

    /// Spawns a task that ends with the server.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut stop = self.stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = task => {}
                () = stopped(&mut stop) => {}
            }
        });
    }

    /// Ends all responses: connections stay open, and nothing is read or written any more.
    pub(crate) fn fall_silent(&self) {
        self.silent.send_replace(true);
    }

    /// Completes when the server has fallen silent.
    pub(crate) async fn silent(&self) {
        // This state holds the sender, so this cannot be an error.
        let _ = self.silent.subscribe().wait_for(|silent| *silent).await;
    }

    pub(crate) fn stats(&self) -> Stats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.counters;
        Stats {
            requests: read(&counters.requests),
            connections_opened: read(&counters.connections_opened),
            connections_open: read(&counters.connections_open),
            in_flight: self.in_flight() as u64,
            completed: read(&counters.completed),
            crashes: read(&counters.crashes),
            mismatches: read(&counters.mismatches),
            aborted: read(&counters.aborted),
            failed: read(&counters.failed),
        }
    }

    pub(crate) fn remember(&self, seen: RecordedRequest) {
        let mut ring = lock(&self.seen);
        ring.bytes += seen.body.len();
        ring.list.push_back(seen);
        while ring.list.len() > MAX_RECORDED_REQUESTS
            || (ring.bytes > MAX_RECORDED_BYTES && ring.list.len() > 1)
        {
            let gone = ring.list.pop_front().map_or(0, |gone| gone.body.len());
            ring.bytes -= gone;
        }
    }

    pub(crate) fn recorded_requests(&self) -> Vec<RecordedRequest> {
        lock(&self.seen).list.iter().cloned().collect()
    }

    pub(crate) fn in_flight(&self) -> usize {
        lock(&self.live).len()
    }

    /// Reserves request ids, all or none. The error is an id that is in use.
    pub(crate) fn admit<'a>(
        self: &Arc<Self>,
        rids: impl Iterator<Item = (&'a str, &'a watch::Sender<bool>)> + Clone,
    ) -> Result<Admission, String> {
        let mut live = lock(&self.live);
        if let Some((rid, _)) = rids.clone().find(|(rid, _)| live.contains_key(*rid)) {
            return Err(rid.to_owned());
        }
        live.extend(rids.clone().map(|(rid, cancel)| (rid.to_owned(), cancel.clone())));
        Ok(Admission { state: Arc::clone(self), rids: rids.map(|(rid, _)| rid.to_owned()).collect() })
    }

    /// Aborts the generation with this id and, as the real scheduler does, all whose ids begin with it.
    pub(crate) fn abort(&self, rid: &str) {
        let live = lock(&self.live);
        if live.contains_key(rid) {
            live.iter().filter(|(own, _)| own.starts_with(rid)).for_each(|(_, cancel)| self.cancel(cancel));
        }
    }

    pub(crate) fn abort_all(&self) {
        lock(&self.live).values().for_each(|cancel| self.cancel(cancel));
    }

    pub(crate) fn cancel(&self, cancel: &watch::Sender<bool>) {
        if !cancel.send_replace(true) {
            bump(&self.counters.aborted);
        }
    }

    /// Decode: reserves a room. `None` if it is in use.
    pub(crate) fn occupy(&self, room: i64) -> Option<Occupied<'_>> {
        let fresh = lock(&self.live_rooms).insert(room);
        // Lazily: an `Occupied` that is built and dropped here would free the room of its holder.
        fresh.then(|| Occupied { state: self, room })
    }
}

/// Reserved request ids, until dropped.
pub(crate) struct Admission {
    state: Arc<State>,
    rids: Vec<String>,
}

impl Drop for Admission {
    fn drop(&mut self) {
        let mut live = lock(&self.state.live);
        for rid in &self.rids {
            live.remove(rid);
        }
    }
}

/// A reserved room, until dropped.
pub(crate) struct Occupied<'a> {
    state: &'a State,
    room: i64,
}

impl Drop for Occupied<'_> {
    fn drop(&mut self) {
        lock(&self.state.live_rooms).remove(&self.room);
    }
}
