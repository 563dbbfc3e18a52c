//! The older worker API of `sglang_router` (`/add_worker?url=…`, `/remove_worker?url=…`, `/list_workers`),
//! which trainers of reinforcement learning call for the servers that they start and stop.
//!
//! It does what the [workers API](super::workers) does, with a query instead of a body, and answers with
//! text.

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};
use serde_json::json;

use super::admin_request::AdminRequest;
use super::workers::WorkersApi;
use crate::error::{Error, OwnResponse, json_response};

impl WorkersApi {
    /// Adds the server at `url`, with `worker_type` and `bootstrap_port` as in `POST /workers`.
    pub(super) fn add_by_query(&self, query: Option<&str>) -> Result<OwnResponse, Error> {
        let server = self.add_server(&AdminRequest::from_query(query)?)?;
        Ok(text(format!("Successfully added worker: {}", server.url())))
    }

    /// Takes the server at `url` out of rotation, without waiting for its requests.
    pub(super) fn remove_by_query(&self, query: Option<&str>) -> Result<OwnResponse, Error> {
        let server = self.find_at(&AdminRequest::from_query(query)?.address("url")?)?;
        self.take_out(&server)?;
        Ok(text(format!("Successfully removed worker: {}", server.url())))
    }

    /// The URLs of the servers in rotation.
    pub(super) fn list_urls(&self) -> OwnResponse {
        let fleet = self.fleet().snapshot();
        let urls: Vec<&str> = fleet.all().map(|server| server.url()).collect();
        json_response(StatusCode::OK, json!({ "urls": urls }).to_string())
    }
}

fn text(text: String) -> OwnResponse {
    let mut response = Response::new(Full::new(Bytes::from(text).into()));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}
