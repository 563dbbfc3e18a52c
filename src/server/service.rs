//! Answers requests: refuses bad heads, finds the route, and survives a panic.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;

use http_body_util::{Either, Full};
use hyper::body::{Body, Incoming};
use hyper::header::{CONNECTION, EXPECT, HeaderMap, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};

use super::activity::Activity;
use super::head;
use super::live::Live;
use super::order;
use super::workers::Common;
use crate::access::{Access, Shared, Terms};
use crate::config::Options;
use crate::control::{self, Control, Draining, Endpoint, allows};
use crate::error::{Error, Reply};
use crate::gate::{Caps, Entrance, Place};
use crate::metrics::{Queue, WorkerMetrics};
use crate::proxy::{Proxy, Relay, Seated, discard};
use crate::record::{Kind, Record, Recorder};
use crate::report::Reporter;
use crate::upstream::{LiveFleet, Pools};
use crate::wire::headers::REQUEST_ID;
use crate::wire::pieces::Pieces;
use crate::wire::shape::Dialect;

/// What a worker answers requests with.
pub(super) struct Service {
    proxy: Proxy,
    control: Control,
    servers: Arc<control::Workers>,
    /// Swept by the worker.
    pub(super) pools: Arc<Pools>,
    pub(super) metrics: Arc<WorkerMetrics>,
    pub(super) recorder: Arc<Recorder>,
    pub(super) reporter: Arc<Reporter>,
    draining: Draining,
    live: Arc<Live>,
    fleet: Arc<LiveFleet>,
    entrance: Arc<Entrance>,
    queue: Arc<Queue>,
    access: Arc<Access>,
}

/// What is held for a request until its answer has ended, where requests are limited.
type Held = Option<Place>;

/// An answer: relayed from a server, or the router's own.
pub(super) type Answer = Response<Either<Relay, Full<Pieces>>>;

/// Where a request goes.
enum Route {
    Proxy(Dialect),
    Control(Endpoint),
    /// To what operators ask of servers.
    Servers,
}

impl Service {
    pub(super) fn new(common: &Common<'_>, options: &Options) -> Self {
        let Common { fleet, servers, guards, live, draining, metrics, reporter } = *common;
        let pools = Arc::new(Pools::new(&options.sockets));
        let (metrics, queue) = (metrics.worker(), Arc::clone(metrics.queue()));
        Self {
            proxy: Proxy::new(Arc::clone(fleet), Arc::clone(&pools), Arc::clone(live.limits())),
            control: Control::new(Arc::clone(fleet), Arc::clone(&pools), draining.clone()),
            servers: Arc::clone(servers),
            pools,
            recorder: Recorder::new(vec![Arc::clone(&metrics) as _, Arc::clone(reporter) as _]),
            reporter: Arc::clone(reporter),
            metrics,
            draining: draining.clone(),
            live: Arc::clone(live),
            fleet: Arc::clone(fleet),
            entrance: Entrance::new(Arc::clone(&guards.gate)),
            queue,
            access: Arc::clone(&guards.access),
        }
    }

    /// Answers a request, whatever happens to it. The place is the answer's, to its end.
    pub(super) async fn answer(
        &self,
        mut request: Request<Incoming>,
        activity: &Activity,
        record: &mut Record,
    ) -> (Answer, Held) {
        // Before the request gets a header of ours.
        let checked = head::check(&request);
        self.reporter.name(&mut request, record);
        let mut terms = self.access.terms(request.headers());
        let is_preflight =
            request.method() == Method::OPTIONS && terms.shared.answers_preflight(request.headers());
        let outcome = match checked {
            Ok(()) => {
                let answering = self.answer_checked(request, &mut terms, is_preflight, activity, record);
                unless_it_panics(pin!(answering)).await
            }
            Err(what) => Err(Error::BadRequest(what)),
        };
        let (mut answer, held) = outcome.unwrap_or_else(|error| (own(&error, record), None));
        terms.shared.write(answer.headers_mut(), is_preflight);
        record.answered(answer.status().as_u16());
        if let Some(id) = record.id() {
            answer.headers_mut().insert(REQUEST_ID, id.clone());
        }
        // Servers' own are not passed on, so this one says that something of the request is unread.
        if answer.headers().contains_key(CONNECTION) {
            activity.cut_short();
        } else if self.draining.has_begun() {
            // Whoever keeps the connection for the next request learns in time that there should be none.
            answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        (answer, held)
    }

    /// Whether the router has been told to end.
    pub(super) fn is_draining(&self) -> bool {
        self.draining.has_begun()
    }

    async fn answer_checked(
        &self,
        mut request: Request<Incoming>,
        terms: &mut Terms,
        is_preflight: bool,
        activity: &Activity,
        record: &mut Record,
    ) -> Result<(Answer, Held), Error> {
        let mut routed = route(request.method(), request.uri().path(), record);
        if let Ok(Route::Servers) = routed {
            // Operators have a key of their own.
            match self.access.may_administrate(activity.peer(), request.headers()) {
                // What operators do is seldom and slow, and not to make every request's future larger.
                Ok(()) => return Ok((Box::pin(self.order(request)).await?, None)),
                Err(error) => routed = Err(error),
            }
        } else if !is_preflight && !needs_no_key(&routed) {
            routed = terms.check().and(routed);
        }
        terms.change(request.headers_mut());
        if let Ok(Route::Proxy(dialect)) = routed {
            match self.admit(activity).await {
                Ok((held, seats)) => {
                    self.reporter.trace(request.headers_mut(), record);
                    let answer = self.proxy.begin().handle(dialect, request, seats, record).await?;
                    return Ok((answer.map(Either::Left), held));
                }
                Err(error) => routed = Err(error),
            }
        }
        let (head, body) = request.into_parts();
        let limits = self.live.limits().load_full();
        // A client that waits for our word before it sends its body need not send it in vain.
        let refused = matches!(routed, Err(Error::Unauthorized | Error::Overloaded(_)));
        let drained = if refused && head.headers.contains_key(EXPECT) {
            body.is_end_stream()
        } else {
            discard(body, limits.body_idle_timeout).await?
        };
        let outcome = match routed {
            // Boxed, so that requests of the other kind are not as large.
            Ok(Route::Control(endpoint)) => {
                Box::pin(self.control.handle(endpoint, head, limits.request_timeout)).await
            }
            Ok(Route::Proxy(_) | Route::Servers) => unreachable!("handled above"),
            Err(Error::MethodNotAllowed { allow }) if is_preflight => Ok(preflight(allow, &head.headers)),
            Err(error) => Err(error),
        };
        let mut answer = outcome.map_or_else(|error| own(&error, record), |reply| reply.map(Either::Right));
        if !drained {
            // What is left of the body would be taken for the next request.
            answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        Ok((answer, None))
    }

    /// Lets a generation request in when it is its turn. Its body is unread until then, so that a queue costs little.
    async fn admit(&self, activity: &Activity) -> Result<(Held, Option<Seated>), Error> {
        if !self.entrance.gate().is_on() {
            return Ok((None, None));
        }
        let take = || {
            let caps = self.entrance.gate().caps();
            if caps == Caps::NONE {
                return Ok(Some(None));
            }
            let seats = self.fleet.now().seats(caps, &self.entrance).map_err(Error::NoServer)?;
            let seated = |seats| Seated { seats, entrance: Arc::clone(&self.entrance) };
            Ok(seats.map(|seats| Some(seated(seats))))
        };
        let mut waiting = None;
        let entered = self.entrance.enter(take, || {
            waiting = Some(self.queue.enter());
            activity.set_queued(true);
        });
        let entered = entered.await;
        if waiting.is_some() {
            activity.set_queued(false);
        }
        if let Err(Error::Overloaded(refusal)) = &entered {
            self.queue.refuse(refusal);
        }
        entered.map(|(place, seats)| (Some(place), seats))
    }

    /// Does what an operator asks for.
    async fn order(&self, request: Request<Incoming>) -> Result<Answer, Error> {
        let (head, body) = request.into_parts();
        let body = order::read(body).await?;
        Ok(self.servers.handle(&head, body).await?.map(Either::Right))
    }
}

/// Whoever watches over the router has no key of its clients'.
fn needs_no_key(routed: &Result<Route, Error>) -> bool {
    matches!(routed, Ok(Route::Control(Endpoint::Health | Endpoint::Ready)))
}

/// The answer to a browser's question about a path.
fn preflight(allow: &'static str, asked: &HeaderMap) -> Reply {
    let mut reply = Reply::default();
    *reply.status_mut() = StatusCode::NO_CONTENT;
    *reply.headers_mut() = Shared::preflight(allow, asked);
    reply
}

/// A panic ends the request that it happens in, and nothing else of the worker's.
async fn unless_it_panics<T>(
    mut answering: Pin<&mut impl Future<Output = Result<T, Error>>>,
) -> Result<T, Error> {
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
    error.to_reply().map(Either::Right)
}

/// Finds the route, and tells `record` of it, whether the method is one of its or not.
fn route(method: &Method, path: &str, record: &mut Record) -> Result<Route, Error> {
    let (route, allow) = match path {
        "/generate" => (Route::Proxy(Dialect::Generate), "POST, PUT"),
        "/v1/chat/completions" => (Route::Proxy(Dialect::Chat), "POST"),
        "/v1/completions" => (Route::Proxy(Dialect::Completions), "POST"),
        _ => match Endpoint::at(path) {
            Some(endpoint) => (Route::Control(endpoint), endpoint.allow()),
            None => (Route::Servers, control::Workers::allow(path).ok_or(Error::NotFound)?),
        },
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
        Route::Servers => Kind::Workers,
    }
}
