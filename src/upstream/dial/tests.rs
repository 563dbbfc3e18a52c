//! Socket options, and the order and times of attempts to connect to a name with several addresses.

use std::sync::Mutex;

use tokio::net::{TcpListener, TcpSocket};
use tokio::time::Instant as Clock;

use super::*;

fn dialer(buffer_size: Option<usize>) -> Dialer {
    Dialer { connect_timeout: Duration::from_secs(5), buffer_size, tls: Arc::default() }
}

async fn dialled(host: &str, dialer: &Dialer) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((host, 0)).await.unwrap();
    let address = Address::parse(&format!("http://{}", listener.local_addr().unwrap())).unwrap();
    let (dialled, accepted) = tokio::join!(dialer.connect_to_any(&address), listener.accept());
    (dialled.unwrap().0, accepted.unwrap().0)
}

#[tokio::test]
async fn every_socket_is_tuned() {
    let dialer = dialer(Some(100_000));
    let (dialled, accepted) = dialled("127.0.0.1", &dialer).await;
    dialer.tune(SockRef::from(&accepted)).unwrap();
    for socket in [&dialled, &accepted] {
        let socket = SockRef::from(socket);
        assert!(socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), KEEPALIVE_IDLE);
        assert_eq!(socket.tcp_keepalive_interval().unwrap(), KEEPALIVE_INTERVAL);
        assert_eq!(socket.tcp_keepalive_retries().unwrap(), KEEPALIVE_PROBES);
        // Linux books twice of what was asked for.
        assert_eq!(socket.send_buffer_size().unwrap(), 200_000);
        assert_eq!(socket.recv_buffer_size().unwrap(), 200_000);
    }
}

#[tokio::test]
async fn an_ipv6_server_is_reached_and_buffers_are_the_kernels_by_default() {
    let plain = TcpSocket::new_v6().unwrap();
    let (dialled, _accepted) = dialled("::1", &dialer(None)).await;
    assert!(dialled.peer_addr().unwrap().is_ipv6());
    let kernels = plain.send_buffer_size().unwrap() as usize;
    assert!(SockRef::from(&dialled).send_buffer_size().unwrap() >= kernels);
}

#[tokio::test]
async fn a_name_is_resolved() {
    let listener = TcpListener::bind("localhost:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let address = Address::parse(&format!("http://localhost:{port}")).unwrap();
    let dialed = dialer(None).dial(&address).await.unwrap();
    assert!(Duration::ZERO < dialed.connect_time && dialed.connect_time < Duration::from_secs(5));
}

/// Addresses with these ports: of IPv6 from 6,000 on, of IPv4 below.
fn addresses(ports: &[u16]) -> Vec<SocketAddr> {
    let host = |port| if port >= 6_000 { "[::1]" } else { "127.0.0.1" };
    ports.iter().map(|port| format!("{}:{port}", host(*port)).parse().unwrap()).collect()
}

#[test]
fn the_families_take_turns() {
    for (resolved, tried) in [
        (&[6_001, 6_002, 6_003, 4_001][..], &[6_001, 4_001, 6_002, 6_003][..]),
        (&[4_001, 4_002, 6_001, 6_002], &[4_001, 6_001, 4_002, 6_002]),
        (&[6_001, 4_001, 4_002, 4_003], &[6_001, 4_001, 4_002, 4_003]),
        (&[4_001, 4_002], &[4_001, 4_002]),
    ] {
        let resolved = addresses(resolved);
        assert_eq!(interleaved(resolved[0], resolved[1..].to_vec()), addresses(tried));
    }
}

/// What an address does with a connection.
#[derive(Clone, Copy)]
enum Peer {
    Accepts(u64),
    Refuses(u64),
    Swallows,
}

/// When each attempt began, in ms; which address was connected to; and when the race was over.
#[derive(Debug, PartialEq, Eq)]
struct Race {
    began: Vec<u64>,
    connected: Option<u16>,
    took: u64,
}

struct Attempt<'a>(&'a Mutex<usize>);

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        *self.0.lock().unwrap() -= 1;
    }
}

async fn race(peers: &[Peer]) -> Race {
    let start = Clock::now();
    let now = || u64::try_from(start.elapsed().as_millis()).unwrap();
    let (began, open) = (Mutex::new(Vec::new()), Mutex::new(0));
    let ports: Vec<u16> = (0..u16::try_from(peers.len()).unwrap()).collect();
    let addresses = addresses(&ports);
    let connected = first_to_connect(&addresses, |address| {
        began.lock().unwrap().push(now());
        *open.lock().unwrap() += 1;
        let attempt = Attempt(&open);
        async move {
            let _attempt = attempt;
            match peers[usize::from(address.port())] {
                Peer::Accepts(after) => sleep(Duration::from_millis(after)).await,
                Peer::Refuses(after) => {
                    sleep(Duration::from_millis(after)).await;
                    return Err(io::ErrorKind::ConnectionRefused.into());
                }
                Peer::Swallows => std::future::pending().await,
            }
            Ok(address.port())
        }
    });
    let connected = tokio::time::timeout(Duration::from_secs(5), connected).await;
    let took = now();
    assert_eq!(*open.lock().unwrap(), 0, "attempts that go on after the race");
    let connected = connected.ok().and_then(Result::ok);
    Race { began: began.into_inner().unwrap(), connected, took }
}

#[tokio::test(start_paused = true)]
async fn an_address_that_swallows_packets_costs_a_quarter_of_a_second() {
    use Peer::*;
    for (peers, began, connected, took) in [
        (&[Accepts(10), Accepts(0)][..], &[0][..], Some(0), 10),
        (&[Swallows, Accepts(10)], &[0, 250], Some(1), 260),
        (&[Swallows, Swallows, Accepts(0)], &[0, 250, 500], Some(2), 500),
        // A refusal brings the next attempt forward, and only that one.
        (&[Refuses(5), Accepts(10)], &[0, 5], Some(1), 15),
        (&[Refuses(5), Swallows, Accepts(10)], &[0, 5, 255], Some(2), 265),
        (&[Swallows, Refuses(5), Accepts(10)], &[0, 250, 255], Some(2), 265),
        // A slow server is not given up when the next attempt begins.
        (&[Accepts(300), Accepts(200)], &[0, 250], Some(0), 300),
        (&[Accepts(300), Swallows], &[0, 250], Some(0), 300),
        (&[Refuses(300), Accepts(200)], &[0, 250], Some(1), 450),
        (&[Refuses(5), Refuses(10)], &[0, 5], None, 15),
        (&[Swallows, Refuses(5)], &[0, 250], None, 5_000),
    ] {
        let expected = Race { began: began.to_vec(), connected, took };
        assert_eq!(race(peers).await, expected);
    }
}

#[tokio::test(start_paused = true)]
async fn attempts_at_the_same_time_are_bounded() {
    let race = race(&[Peer::Swallows; MAX_ATTEMPTS + 8]).await;
    assert_eq!(race.began.len(), MAX_ATTEMPTS);
    assert_eq!(race.connected, None);
}

/// A listener whose queue is full: the kernel drops what else arrives.
async fn swallowing() -> (TcpListener, Vec<TcpStream>) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(1).unwrap();
    let address = listener.local_addr().unwrap();
    let mut queued = Vec::new();
    for _ in 0..64 {
        match tokio::time::timeout(Duration::from_millis(300), TcpStream::connect(address)).await {
            Ok(stream) => queued.push(stream.unwrap()),
            Err(_) => return (listener, queued),
        }
    }
    panic!("a queue of 1 takes 64 connections");
}

#[tokio::test]
async fn a_server_is_reached_behind_an_address_that_swallows_packets() {
    let (full, _queued) = swallowing().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addresses = [full.local_addr().unwrap(), listener.local_addr().unwrap()];
    let dialer = dialer(None);
    let start = Instant::now();
    let (stream, connect_time) =
        first_to_connect(&addresses, |address| timed(dialer.connect(address))).await.unwrap();
    assert_eq!(stream.peer_addr().unwrap(), addresses[1]);
    assert!(start.elapsed() >= ATTEMPT_DELAY);
    // Without the time for which the first address was waited for. The kernel repeats a SYN after 1 s.
    assert!(connect_time < start.elapsed() - ATTEMPT_DELAY + Duration::from_millis(1), "{connect_time:?}");
}
