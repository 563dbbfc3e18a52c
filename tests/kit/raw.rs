//! Exchanges of bytes up to the end of a connection, and a router between two servers that accept everything.

use mini_lb::MiniLbConfig;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{Router, ScriptedServer, json, with_timeout};

/// A router between one prefill and one decode server that respond 200 to every request.
pub struct Setup {
    pub prefill: ScriptedServer,
    pub decode: ScriptedServer,
    pub router: Router,
}

impl Setup {
    pub async fn start(options: impl FnOnce(MiniLbConfig) -> MiniLbConfig) -> Self {
        let response = json("200 OK", r#"{"done":true}"#);
        let prefill = ScriptedServer::always(response.clone()).await;
        let decode = ScriptedServer::always(response).await;
        let router = Router::start_with(&[&prefill], &[&decode], options).await;
        Self { prefill, decode, router }
    }
}

/// Sends bytes and returns all that arrives until the router closes the connection.
pub async fn send_and_read_to_end(router: &Router, bytes: impl AsRef<[u8]>) -> String {
    let mut socket = TcpStream::connect(router.address()).await.expect("the router listens");
    socket.write_all(bytes.as_ref()).await.expect("the router reads");
    read_to_end(&mut socket).await
}

pub async fn read_to_end(socket: &mut TcpStream) -> String {
    let mut all = Vec::new();
    with_timeout("the connection's end", socket.read_to_end(&mut all)).await.expect("a clean end");
    String::from_utf8(all).expect("UTF-8")
}

/// Asserts that a response is an error of the router's own and announces the connection's end.
pub fn assert_final_error(response: &str, status: &str, code: &str) {
    let (head, body) = response.split_once("\r\n\r\n").unwrap_or_else(|| panic!("a response: {response:?}"));
    assert!(head.starts_with(&format!("HTTP/1.1 {status}\r\n")), "{head}");
    assert!(head.contains("\r\nconnection: close"), "{head}");
    assert!(head.contains("\r\ncontent-type: application/json"), "{head}");
    let error = serde_json::from_str::<serde_json::Value>(body).unwrap_or_else(|_| panic!("JSON: {body}"));
    assert_eq!(error["error"]["code"], code, "{body}");
}
