//! Answers requests: refuses bad heads, finds the route, and survives a panic.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;

use bytes::Bytes;
use http_body_util::{Either, Full};
use hyper::body::Incoming;
use hyper::header::{CONNECTION, HeaderValue};
use hyper::{Method, Request, Response};
use tracing::{debug, error, warn};

use super::activity::Activity;
use super::head;
use super::live::Live;
use crate::config::Options;
use crate::control::{Control, Draining, Endpoint, allows};
use crate::error::Error;
use crate::metrics::{Metrics, WorkerMetrics};
use crate::proxy::{Proxy, Relay, discard};
use crate::record::{Kind, Record, Recorder};
use crate::upstream::{LiveFleet, Pools};
use crate::wire::shape::Dialect;

/// What a worker answers requests with.
pub(super) struct Service {
    proxy: Proxy,
    control: Control,
    /// Swept by the worker.
    pub(super) pools: Arc<Pools>,
    pub(super) metrics: Arc<WorkerMetrics>,
    pub(super) recorder: Arc<Recorder>,
    draining: Draining,
    live: Arc<Live>,
}

/// An answer: relayed from a server, or the router's own.
pub(super) type Answer = Response<Either<Relay, Full<Bytes>>>;

/// Where a request goes.
enum Route {
    Proxy(Dialect),
    Control(Endpoint),
}

impl Service {
    pub(super) fn new(
        fleet: &Arc<LiveFleet>,
        options: &Options,
        live: &Arc<Live>,
        draining: &Draining,
        metrics: &Metrics,
    ) -> Self {
        let pools = Arc::new(Pools::new(&options.sockets));
        let metrics = metrics.worker();
        Self {
            proxy: Proxy::new(Arc::clone(fleet), Arc::clone(&pools), Arc::clone(live.limits())),
            control: Control::new(Arc::clone(fleet), Arc::clone(&pools), draining.clone()),
            pools,
            recorder: Recorder::new(vec![Arc::clone(&metrics) as _]),
            metrics,
            draining: draining.clone(),
            live: Arc::clone(live),
        }
    }

    /// Answers a request, whatever happens to it.
    pub(super) async fn answer(
        &self,
        request: Request<Incoming>,
        activity: &Activity,
        record: &mut Record,
    ) -> Answer {
        let outcome = match head::check(&request) {
            Ok(()) => unless_it_panics(pin!(self.answer_checked(request, record))).await,
            Err(what) => Err(Error::BadRequest(what)),
        };
        let mut answer = outcome.unwrap_or_else(|error| own(&error, record));
        record.answered(answer.status().as_u16());
        // Servers' own are not passed on, so this one says that something of the request is unread.
        if answer.headers().contains_key(CONNECTION) {
            activity.cut_short();
        } else if self.draining.has_begun() {
            // Whoever keeps the connection for the next request learns in time that there should be none.
            answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        answer
    }

    async fn answer_checked(&self, request: Request<Incoming>, record: &mut Record) -> Result<Answer, Error> {
        let routed = route(request.method(), request.uri().path(), record);
        if let Ok(Route::Proxy(dialect)) = routed {
            return Ok(self.proxy.begin().handle(dialect, request, record).await?.map(Either::Left));
        }
        let (head, body) = request.into_parts();
        let limits = self.live.limits().load_full();
        let drained = discard(body, limits.body_idle_timeout).await?;
        let outcome = match routed {
            // Boxed, so that requests of the other kind are not as large.
            Ok(Route::Control(endpoint)) => {
                Box::pin(self.control.handle(endpoint, head, limits.request_timeout)).await
            }
            Ok(Route::Proxy(_)) => unreachable!("handled above"),
            Err(error) => Err(error),
        };
        let mut answer = outcome.map_or_else(|error| own(&error, record), |reply| reply.map(Either::Right));
        if !drained {
            // What is left of the body would be taken for the next request.
            answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        Ok(answer)
    }
}

/// A panic ends the request that it happens in, and nothing else of the worker's.
async fn unless_it_panics(
    mut answering: Pin<&mut impl Future<Output = Result<Answer, Error>>>,
) -> Result<Answer, Error> {
    std::future::poll_fn(|cx| {
        // Nothing of it is used again: it is dropped, and the connection is closed.
        let polled = catch_unwind(AssertUnwindSafe(|| answering.as_mut().poll(cx)));
        polled.unwrap_or(Poll::Ready(Err(Error::Internal)))
    })
    .await
}

/// The router's own answer to an error.
fn own(error: &Error, record: &mut Record) -> Answer {
    record.failed(error);
    match error {
        // What the panic said may hold a client's bytes.
        Error::Internal => error!(code = error.code(), "{error}"),
        Error::Upstream { .. } => warn!(code = error.code(), "{error}"),
        _ => debug!(code = error.code(), "{error}"),
    }
    error.to_reply().map(Either::Right)
}

/// Finds the route, and tells `record` of it, whether the method is one of its or not.
fn route(method: &Method, path: &str, record: &mut Record) -> Result<Route, Error> {
    let (route, allow) = match path {
        "/generate" => (Route::Proxy(Dialect::Generate), "POST, PUT"),
        "/v1/chat/completions" => (Route::Proxy(Dialect::Chat), "POST"),
        "/v1/completions" => (Route::Proxy(Dialect::Completions), "POST"),
        _ => {
            let endpoint = Endpoint::at(path).ok_or(Error::NotFound)?;
            (Route::Control(endpoint), endpoint.allow())
        }
    };
    record.is(kind(&route));
    if allows(allow, method) { Ok(route) } else { Err(Error::MethodNotAllowed { allow }) }
}

fn kind(route: &Route) -> Kind {
    match route {
        Route::Proxy(dialect) => (*dialect).into(),
        Route::Control(Endpoint::Health) => Kind::Health,
        Route::Control(Endpoint::Ready) => Kind::Ready,
        Route::Control(Endpoint::HealthGenerate) => Kind::HealthGenerate,
        Route::Control(Endpoint::FlushCache) => Kind::FlushCache,
        Route::Control(Endpoint::ServerInfo) => Kind::ServerInfo,
        Route::Control(Endpoint::FromOne) => Kind::ModelInfo,
    }
}
