//! The requests for pods, and the API server's responses: pages of a list, and the events of a watch, one
//! JSON text to a line.
//!
//! When to list or to watch is decided elsewhere.

use std::time::Duration;

use hyper::Uri;
use kube_core::params::{ListParams, WatchParams};
use kube_core::request::{Error as RequestError, Request as PodRequest};
use kube_core::{ObjectList, WatchEvent};
use memchr::memchr;
use tokio::time::timeout;

use super::client::{ApiClient, ApiResponse};
use super::cluster::Cluster;
use super::failure::ApiError;
use super::pod::Pod;
use crate::upstream::PodSource;

/// Pods of one page, as in Kubernetes' own clients.
const PAGE: u32 = 500;
/// Most bytes of a page: 500 pods have 10 MB at most as a rule.
const MAX_PAGE: usize = 64 << 20;
/// Most bytes of an event: etcd keeps no object of more than 1.5 MiB, which is more as JSON.
const MAX_EVENT: usize = 4 << 20;
/// Time for a page of a list, and for the head of the response to a watch.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the API server is asked to keep a watch open. It sends the version to go on from right before the
/// end. Shorter than in other clients, since it is also how long a connection that was cut without a word is
/// taken for a quiet one.
const WATCH_SECONDS: u32 = 60;
/// Time after which a watch must have ended or sent something.
const WATCH_SILENCE: Duration = Duration::from_secs(WATCH_SECONDS as u64 + 5);

/// The pods of one source at an API server.
pub(super) struct PodApi {
    client: ApiClient,
    pods: PodRequest,
    selector: String,
}

/// A page of a list.
pub(super) type PodPage = ObjectList<Pod>;

impl PodApi {
    /// Reads the files of credentials and certificates. Nothing is sent yet.
    pub(super) fn new(source: &PodSource) -> Result<Self, ApiError> {
        let cluster = Cluster::find().map_err(ApiError::Configuration)?;
        let (pods, selector) = (PodRequest::new(source.path()), source.label_selector());
        Ok(Self { client: ApiClient::new(cluster), pods, selector })
    }

    /// A page of the list, the one after that with this token.
    pub(super) async fn page(&mut self, continue_token: Option<String>) -> Result<PodPage, ApiError> {
        let params = ListParams { continue_token, ..ListParams::default() };
        let target = self.pods.list(&params.limit(PAGE).labels(&self.selector));
        let target = target_of(target)?;
        let page = within(async {
            let mut response = self.client.get(&target).await?;
            let page = response.read(MAX_PAGE).await?;
            self.client.keep(response);
            Ok(page)
        });
        serde_json::from_slice(&page.await?)
            .map_err(|error| ApiError::Malformed(format!("the response is not a list of pods: {error}")))
    }

    /// Opens a watch from this version.
    pub(super) async fn watch(&mut self, version: &str) -> Result<PodEvents, ApiError> {
        let params = WatchParams::default().timeout(WATCH_SECONDS).labels(&self.selector);
        let target = target_of(self.pods.watch(&params, version))?;
        let response = within(self.client.get(&target)).await?;
        Ok(PodEvents { response, has_ended: false, lines: Lines::default() })
    }

    /// Uses the connection of a watch again that has ended.
    pub(super) fn keep(&mut self, events: PodEvents) {
        self.client.keep(events.response);
    }
}

/// An open watch.
pub(super) struct PodEvents {
    response: ApiResponse,
    has_ended: bool,
    lines: Lines,
}

impl PodEvents {
    /// The next event. `None`: the watch has ended, or was silent for longer than it can last, so that the
    /// connection is dead. When this is not awaited to its end, nothing is lost.
    pub(super) async fn next(&mut self) -> Result<Option<WatchEvent<Pod>>, ApiError> {
        loop {
            if let Some(line) = self.lines.next() {
                let event = serde_json::from_slice(line);
                return event.map(Some).map_err(|error| {
                    ApiError::Malformed(format!("the watch sent what is no event: {error}"))
                });
            }
            if self.has_ended {
                // A line without its end is sent again by the next watch.
                return Ok(None);
            }
            if self.lines.buffer.len() > MAX_EVENT {
                return Err(ApiError::Malformed(format!("an event has more than {MAX_EVENT} bytes")));
            }
            match timeout(WATCH_SILENCE, self.response.next_bytes()).await {
                Ok(Some(bytes)) => self.lines.push(&bytes),
                Ok(None) | Err(_) => self.has_ended = true,
            }
        }
    }
}

/// Splits bytes into lines.
#[derive(Default)]
struct Lines {
    buffer: Vec<u8>,
    /// Where the next line begins.
    start: usize,
    /// Until where there is no end of it.
    scanned: usize,
}

impl Lines {
    fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.start);
        self.scanned -= self.start;
        self.start = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next line that is not empty, if its end has arrived.
    fn next(&mut self) -> Option<&[u8]> {
        loop {
            let Some(end) = memchr(b'\n', &self.buffer[self.scanned..]) else {
                self.scanned = self.buffer.len();
                return None;
            };
            let (start, end) = (self.start, self.scanned + end);
            (self.start, self.scanned) = (end + 1, end + 1);
            if !self.buffer[start..end].trim_ascii().is_empty() {
                return Some(&self.buffer[start..end]);
            }
        }
    }
}

/// Path and query of a request.
fn target_of(request: Result<hyper::Request<Vec<u8>>, RequestError>) -> Result<Uri, ApiError> {
    match request {
        Ok(request) => Ok(request.into_parts().0.uri),
        // As a namespace that is none.
        Err(error) => Err(ApiError::Configuration(error.to_string())),
    }
}

/// Waits for a response, but not for ever.
async fn within<T>(response: impl Future<Output = Result<T, ApiError>>) -> Result<T, ApiError> {
    match timeout(ANSWER_TIMEOUT, response).await {
        Ok(response) => response,
        Err(_) => Err(ApiError::Timeout(format!("no response within {ANSWER_TIMEOUT:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_whole_however_the_bytes_are_cut() {
        let text = b"{\"a\":1}\n\n \r\n{\"b\":2}\r\n{\"c\"";
        for size in 1..=text.len() {
            let (mut lines, mut seen) = (Lines::default(), Vec::new());
            for bytes in text.chunks(size) {
                lines.push(bytes);
                while let Some(line) = lines.next() {
                    seen.push(String::from_utf8(line.to_vec()).unwrap());
                }
            }
            assert_eq!(seen, ["{\"a\":1}", "{\"b\":2}\r"], "{size}");
            assert_eq!(lines.buffer[lines.start..], *b"{\"c\"");
        }
    }
}
