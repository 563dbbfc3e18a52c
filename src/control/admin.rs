//! What the admin listener answers.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use hyper::http::request;
use hyper::{Method, Response};

use super::endpoints::allows;
use crate::error::{Error, Reply};
use crate::upstream::LiveFleet;

/// Answers for operators.
pub(crate) struct Admin {
    _fleet: Arc<LiveFleet>,
}

impl Admin {
    pub(crate) fn new(fleet: Arc<LiveFleet>) -> Self {
        Self { _fleet: fleet }
    }

    pub(crate) async fn handle(
        &self,
        head: &request::Parts,
        _body: Bytes,
        _peer: SocketAddr,
    ) -> Result<Reply, Error> {
        match head.uri.path() {
            "/health" => only("GET, HEAD", &head.method).map(|()| Response::default()),
            _ => Err(Error::NotFound),
        }
    }
}

/// Refuses all methods but those of an `Allow` list.
fn only(allow: &'static str, method: &Method) -> Result<(), Error> {
    if allows(allow, method) { Ok(()) } else { Err(Error::MethodNotAllowed { allow }) }
}
