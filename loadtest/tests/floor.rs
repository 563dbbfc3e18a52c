//! `loadtest floor`: what a client sends reaches both servers, and only decode's response the client.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    thread,
};

/// More than all socket buffers between the two ends hold.
const LARGE: usize = 24 << 20;

struct Floor(Child);

impl Drop for Floor {
    fn drop(&mut self) {
        // Has it exited by itself, there is nothing to kill.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(prefill: &TcpListener, decode: &TcpListener) -> (Floor, TcpStream) {
    let [prefill, decode] = [prefill, decode].map(|server| server.local_addr().unwrap().to_string());
    let mut command = Command::new(env!("CARGO_BIN_EXE_loadtest"));
    command.args(["floor", "--prefill", &prefill, "--decode", &decode]).stdout(Stdio::piped());
    let mut floor = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(floor.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let client = TcpStream::connect(line.trim().strip_prefix("listening on http://").unwrap()).unwrap();
    (Floor(floor), client)
}

/// Bytes of which no two chunks are the same.
fn sent() -> Vec<u8> {
    (0..LARGE).map(|at| (at % 251 + at / 65_536) as u8).collect()
}

#[test]
fn a_large_request_reaches_both_servers_and_only_decodes_response_the_client() {
    let servers = [TcpListener::bind("127.0.0.1:0").unwrap(), TcpListener::bind("127.0.0.1:0").unwrap()];
    let (_floor, mut client) = start(&servers[0], &servers[1]);
    thread::scope(|scope| {
        for (listener, response) in servers.iter().zip(["prefill's", "decode's"]) {
            scope.spawn(move || {
                let (mut server, _) = listener.accept().unwrap();
                let mut got = vec![0; LARGE];
                server.read_exact(&mut got).unwrap();
                assert!(got == sent(), "{response} request");
                server.write_all(response.as_bytes()).unwrap();
                // The client's end closes both.
                assert_eq!(server.read(&mut got).unwrap_or(0), 0);
            });
        }
        client.write_all(&sent()).unwrap();
        let mut got = [0; "decode's".len()];
        client.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"decode's");
        drop(client);
    });
}

#[test]
fn a_server_that_closes_ends_the_client_and_the_other_server() {
    let [prefill, decode] =
        [TcpListener::bind("127.0.0.1:0").unwrap(), TcpListener::bind("127.0.0.1:0").unwrap()];
    let (_floor, mut client) = start(&prefill, &decode);
    let (mut at_prefill, at_decode) = (prefill.accept().unwrap().0, decode.accept().unwrap().0);
    drop(at_decode);
    let mut rest = Vec::new();
    assert_eq!(client.read_to_end(&mut rest).unwrap_or(0), 0);
    assert_eq!(at_prefill.read_to_end(&mut rest).unwrap_or(0), 0);
}
