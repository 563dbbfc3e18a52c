//! KV transfer of one prompt, from the side of either leg: waits, timeouts and error messages. Tokens are
//! produced elsewhere.

use std::{sync::Arc, time::Duration};

use tokio::{sync::watch, time};

use super::{
    bootstrap_fields::{BootstrapTarget, FAKE_HOST},
    config::{
        BOOTSTRAP_TIMEOUT, DEFAULT_BOOTSTRAP_PORT, HANDSHAKE_TIMEOUT, HEARTBEAT_TIMEOUT, LoadBalance, Role,
        WAITING_TIMEOUT,
    },
    encoder,
    rendezvous::{
        Op,
        peers::{Peer, TransferEnd},
        rooms::{Meeting, Place},
    },
    request::Item,
    state::{Phase, State, bump},
};

/// Pause between two attempts to reach a bootstrap server.
const REDIAL: Duration = Duration::from_millis(50);
const ABORTED: &str = "Aborted by AbortReq.";

/// Why a generation failed.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    pub status: u16,
    pub message: String,
}

/// Completes when the item is cancelled.
pub(crate) async fn cancelled(item: &Item) {
    let mut cancel: watch::Receiver<bool> = item.cancel.subscribe();
    // The item holds the sender, so this cannot be an error.
    let _ = cancel.wait_for(|cancelled| *cancelled).await;
}

/// Waits for the other leg and for the transfer. Returns the hash of the prompt that prefill computed, which
/// determines the output.
pub(crate) async fn transfer(state: &Arc<State>, item: &Item, n: usize) -> Result<u64, Failure> {
    match &item.bootstrap {
        _ if state.config.role == Role::Regular => Ok(item.prompt.hash),
        BootstrapTarget::Missing => Err(without_room(item)),
        BootstrapTarget::At { host, .. } if host == FAKE_HOST => {
            bump(&state.counters.mismatches);
            Ok(!item.prompt.hash)
        }
        BootstrapTarget::At { room, .. } if state.config.role == Role::Prefill => {
            encode(state, item, *room).await?;
            prefill(state, item, *room).await
        }
        BootstrapTarget::At { host, port, room } => {
            let port = port.or(state.config.bootstrap_port).unwrap_or(DEFAULT_BOOTSTRAP_PORT);
            Decode { state, item, host, port, room: *room }.run(n).await
        }
    }
}

fn without_room(item: &Item) -> Failure {
    let message = format!(
        "Invalid request: Disaggregated request received without bootstrap room id. req.rid='{}'",
        item.rid
    );
    Failure { status: 400, message }
}

fn prefill_failure(item: &Item, room: i64, stage: &str, why: &str) -> Failure {
    let message = format!(
        "Prefill {stage} failed for request rank=0 req.rid='{}' req.bootstrap_room={room} with exception \
         KVTransferError(bootstrap_room={room}): {why}",
        item.rid
    );
    Failure { status: 500, message }
}

/// Language-only: waits until the encoders have encoded what is no text.
async fn encode(state: &Arc<State>, item: &Item, room: i64) -> Result<(), Failure> {
    tokio::select! {
        biased;
        encoded = encoder::dispatch(state, &item.rid, &item.media) => encoded,
        () = cancelled(item) => Err(prefill_failure(item, room, "bootstrap", ABORTED)),
    }
}

/// Whether decode finds the rank of an item by the room, or asks for it: SGLang's prefill tells it unless the
/// request does. The error is a rank that the room contradicts.
fn is_found_by_room(state: &State, item: &Item, room: i64) -> Result<bool, Failure> {
    let (rank, of_room) = (item.dispatch.number(), state.ranks.of_room(room));
    let follows = state.config.balance() == LoadBalance::FollowBootstrapRoom;
    if item.dispatch.prefill.is_none() && follows && rank != of_room {
        let why = format!(
            "follow_bootstrap_room conflict: dispatched to dp_rank {rank} but bootstrap_room {room} implies dp_rank \
             {of_room}. Set SGLANG_DISAGGREGATION_FORCE_QUERY_PREFILL_DP_RANK=1 to allow mixed routing."
        );
        return Err(prefill_failure(item, room, "bootstrap", &why));
    }
    Ok(if follows { rank == of_room } else { item.dispatch.prefill.is_none() })
}

async fn prefill(state: &State, item: &Item, room: i64) -> Result<u64, Failure> {
    let place = Place { rank: item.dispatch.number(), is_found: is_found_by_room(state, item, room)? };
    let mut stay = state.rooms.enter(room as u64, place);
    if stay.duplicate {
        bump(&state.counters.crashes);
    }
    let waiting = Phase::enter(&state.gauges.bootstrap);
    let met = tokio::select! {
        met = stay.met() => met,
        () = cancelled(item) => return Err(prefill_failure(item, room, "bootstrap", ABORTED)),
        () = time::sleep(state.config.scaled(BOOTSTRAP_TIMEOUT)) => None,
    };
    drop(waiting);
    let Some(met) = met else {
        let why = format!("Request {room} timed out after 300.0s in KVPoll.Bootstrapping");
        return Err(prefill_failure(item, room, "bootstrap", &why));
    };
    let _phase = Phase::enter(&state.gauges.inflight);
    let Meeting::Partner(partner) = met else {
        time::sleep(state.config.prefill_time).await;
        return Ok(item.prompt.hash);
    };
    tokio::select! {
        biased;
        () = cancelled(item) => {
            partner.send(Op::Failed, 0).await;
            return Err(prefill_failure(item, room, "transfer", ABORTED));
        }
        () = partner.gone() => {
            return Err(prefill_failure(item, room, "transfer", "Decode instance could be dead"));
        }
        () = pause(state.config.prefill_time) => {}
    }
    partner.send(Op::Delivered, item.prompt.hash).await;
    Ok(item.prompt.hash)
}

/// tokio's timers round up to a millisecond; a zero pause must not take one.
pub(crate) async fn pause(time: Duration) {
    if !time.is_zero() {
        time::sleep(time).await;
    }
}

struct Decode<'a> {
    state: &'a Arc<State>,
    item: &'a Item,
    host: &'a str,
    port: u16,
    room: i64,
}

impl Decode<'_> {
    fn failure(&self, stage: &str, why: &str) -> Failure {
        let room = self.room;
        let message = format!(
            "Decode {stage} failed for request rank=0 decode_req.req.rid='{}' decode_req.req.bootstrap_room={room} \
             with exception KVTransferError(bootstrap_room={room}): {why}",
            self.item.rid
        );
        Failure { status: 500, message }
    }

    async fn run(&self, n: usize) -> Result<u64, Failure> {
        let Some(_room) = self.state.occupy(self.room) else {
            bump(&self.state.counters.crashes);
            return Err(self.hang().await);
        };
        let patience = time::sleep(self.state.config.scaled(WAITING_TIMEOUT));
        let aborted = || self.failure("transfer", ABORTED);
        tokio::select! {
            biased;
            () = cancelled(self.item) => Err(aborted()),
            end = self.attempt(n) => end,
            () = patience => Err(self.timed_out()),
        }
    }

    fn timed_out(&self) -> Failure {
        let why = format!("Request {} timed out after 300.0s in KVPoll.WaitingForInput", self.room);
        self.failure("transfer", &why)
    }

    /// A state that the real server never leaves: waits until the request is cancelled.
    async fn hang(&self) -> Failure {
        let _phase = Phase::enter(&self.state.gauges.transfer);
        tokio::select! {
            () = cancelled(self.item) => self.failure("transfer", ABORTED),
            () = time::sleep(self.state.config.scaled(WAITING_TIMEOUT)) => self.timed_out(),
        }
    }

    async fn attempt(&self, n: usize) -> Result<u64, Failure> {
        let prealloc = Phase::enter(&self.state.gauges.prealloc);
        let peer = self.reach().await?;
        drop(prealloc);
        let _phase = Phase::enter(&self.state.gauges.transfer);
        let end = match peer.claim(self.room as u64, self.item.dispatch.prefill).await {
            Some(mut claim) => claim.finished().await,
            None => None,
        };
        match end {
            // Room 0 looks like metadata that has not arrived. The samples of n > 1 share one room.
            Some(TransferEnd::Delivered(_)) if self.room == 0 || n > 1 => Err(self.hang().await),
            Some(TransferEnd::Delivered(hash)) => {
                if hash != self.item.prompt.hash {
                    bump(&self.state.counters.mismatches);
                }
                Ok(hash)
            }
            Some(TransferEnd::Failed) => {
                Err(self.failure("transfer", "Failed to get kvcache from prefill instance, it might be dead"))
            }
            None => {
                time::sleep(self.state.config.scaled(HEARTBEAT_TIMEOUT)).await;
                let at = format!("(bootstrap_addr: {}:{})", self.host, self.port);
                Err(self.failure("transfer", &format!("Lost connection with prefill instance {at}")))
            }
        }
    }

    async fn reach(&self) -> Result<Arc<Peer>, Failure> {
        let limit = time::sleep(self.state.config.scaled(HANDSHAKE_TIMEOUT));
        let dial = async {
            loop {
                match self.state.peers.reach(self.host, self.port, self.state).await {
                    Ok(peer) => return peer,
                    Err(_) => time::sleep(REDIAL).await,
                }
            }
        };
        tokio::select! {
            biased;
            peer = dial => Ok(peer),
            () = limit => Err(self.failure("handshake", ABORTED)),
        }
    }
}
