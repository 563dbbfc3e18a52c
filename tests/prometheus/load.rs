//! Load on a router whose responses nobody looks at: requests are sent at a rate, whatever became of those
//! before.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::MissedTickBehavior;

/// Requests that may wait for their responses. Further ones are not sent.
const MAX_OPEN: usize = 400;

/// Ends when it is dropped; then its clients disconnect.
pub struct Load(JoinHandle<()>);

impl Load {
    /// Sends the path and body that `request` returns for a number, `rate` times a second.
    pub fn start(
        target: SocketAddr,
        rate: u32,
        request: impl Fn(usize) -> (&'static str, String) + Send + 'static,
    ) -> Self {
        Self(tokio::spawn(async move {
            let mut ticks = tokio::time::interval(Duration::from_secs(1) / rate);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut open = JoinSet::new();
            for number in 0.. {
                ticks.tick().await;
                while open.try_join_next().is_some() {}
                if open.len() < MAX_OPEN {
                    let (path, body) = request(number);
                    // Fails where a test wants requests to fail.
                    open.spawn(async move { drop(send(target, path, body).await) });
                }
            }
        }))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn send(target: SocketAddr, path: &str, body: String) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(target).await?;
    let length = body.len();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: router\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    let mut buffer = vec![0; 16 << 10];
    while stream.read(&mut buffer).await? > 0 {}
    Ok(())
}

/// A request of `/generate` for a prompt.
pub fn generate(prompt: &str, tokens: usize, is_stream: bool) -> (&'static str, String) {
    let body = format!(
        r#"{{"text":"{prompt}","stream":{is_stream},"sampling_params":{{"max_new_tokens":{tokens},"ignore_eos":true}}}}"#
    );
    ("/generate", body)
}
