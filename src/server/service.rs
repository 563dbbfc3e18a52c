//! Answers requests: finds the route, reads what is wanted of the body, and survives a panic.

use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Instant;

use hyper::{Method, StatusCode};

use super::admin_body;
use super::live_settings::LiveSettings;
use super::response::ClientResponse;
use super::worker_threads::SharedState;
use crate::admin::{self, Draining, RouterEndpoint, RouterEndpoints, allows};
use crate::admission::{AccessControl, AuthDecision, CorsDecision};
use crate::admission::{AdmissionHandle, BackendCaps, Permit};
use crate::config::Options;
use crate::error::{Error, OwnResponse};
use crate::http1::{HeaderId, RawHeaders, RequestHead};
use crate::observe::metrics::{QueueMetrics, WorkerMetrics};
use crate::observe::record::{Endpoint, Record, Recorder};
use crate::observe::report::RequestLogger;
use crate::proxy::{self, AdmittedPair, Proxy, RequestBody, discard};
use crate::timer::Timer;
use crate::upstream::{LiveFleet, Pools};
use crate::wire::shape::Dialect;

/// What a worker answers requests with.
pub(super) struct Service {
    proxy: Proxy,
    control: RouterEndpoints,
    servers: Arc<admin::WorkersApi>,
    /// Swept by the worker.
    pub(super) pools: Arc<Pools>,
    pub(super) metrics: Arc<WorkerMetrics>,
    pub(super) recorder: Arc<Recorder>,
    pub(super) reporter: Arc<RequestLogger>,
    draining: Draining,
    live: Arc<LiveSettings>,
    fleet: Arc<LiveFleet>,
    entrance: Arc<AdmissionHandle>,
    queue: Arc<QueueMetrics>,
    access: Arc<AccessControl>,
}

/// What is held for a request until its answer has ended, where requests are limited.
type Held = Option<Permit>;

/// A client whose request is read and answered.
pub(crate) trait ClientTransport: RequestBody + Send {
    /// Who it is.
    fn peer(&self) -> Option<SocketAddr>;

    /// Waits for what it is answered with, unless it leaves.
    fn cancel_on_disconnect<T: Send>(
        &mut self,
        answer: impl Future<Output = T> + Send,
    ) -> impl Future<Output = Option<T>> + Send;
}

/// A request that is to be answered.
struct PendingRequest<'a> {
    head: &'a mut RequestHead,
    /// It is a browser's question.
    is_preflight: bool,
    timer: &'a mut Timer,
}

/// What came of a request.
enum HandlerResult {
    Relayed(proxy::UpstreamResponse, Held),
    Own(OwnResponse),
}

/// Where a request goes.
enum Route {
    Proxy(Dialect),
    RouterEndpoints(RouterEndpoint),
    /// To what operators ask of servers.
    Servers,
}

impl Service {
    pub(super) fn new(common: &SharedState<'_>, options: &Options) -> Self {
        let SharedState { fleet, servers, guards, live, draining, metrics, reporter } = *common;
        let pools = Arc::new(Pools::new(&options.sockets));
        let (metrics, queue) = (metrics.worker(), Arc::clone(metrics.queue()));
        Self {
            proxy: Proxy::new(Arc::clone(fleet), Arc::clone(&pools), Arc::clone(live.limits())),
            control: RouterEndpoints::new(Arc::clone(fleet), Arc::clone(&pools), draining.clone()),
            servers: Arc::clone(servers),
            pools,
            recorder: Recorder::new(vec![Arc::clone(&metrics) as _, Arc::clone(reporter) as _]),
            reporter: Arc::clone(reporter),
            metrics,
            draining: draining.clone(),
            live: Arc::clone(live),
            fleet: Arc::clone(fleet),
            entrance: AdmissionHandle::new(Arc::clone(&guards.gate)),
            queue,
            access: Arc::clone(&guards.access),
        }
    }

    /// Reads a request, or as much of it as is wanted, and answers it, whatever happens. `None`: its client has left.
    pub(super) async fn answer(
        &self,
        mut head: RequestHead,
        client: &mut impl ClientTransport,
        timer: &mut Timer,
    ) -> Option<ClientResponse> {
        let mut record = self.recorder.begin();
        self.reporter.name(&mut head, &mut record);
        let mut terms = self.access.terms(&head.fields);
        let is_preflight = head.method == Method::OPTIONS && terms.shared.answers_preflight(&head.fields);
        let outcome = {
            let asked = PendingRequest { head: &mut head, is_preflight, timer };
            let answering = self.try_answer(asked, client, &mut terms, &mut record);
            catch_panic(pin!(answering)).await.transpose()?
        };
        let mut answer = match outcome {
            Ok(HandlerResult::Relayed(answer, place)) => ClientResponse::relayed(answer, place, record),
            Ok(HandlerResult::Own(reply)) => ClientResponse::own(reply, record),
            Err(error) => ClientResponse::error(&error, record),
        };
        if terms.shared.is_said() {
            terms.shared.write(&mut answer.head, is_preflight);
        }
        Some(answer)
    }

    /// Whether the router has been told to end.
    pub(super) fn is_draining(&self) -> bool {
        self.draining.has_begun()
    }

    async fn try_answer(
        &self,
        PendingRequest { head, is_preflight, timer }: PendingRequest<'_>,
        client: &mut impl ClientTransport,
        terms: &mut AuthDecision,
        record: &mut Record,
    ) -> Result<Option<HandlerResult>, Error> {
        if let Some(reject_reason) = head.reject_reason {
            return Err(Error::BadRequest(reject_reason));
        }
        let mut routed = route(&head.method, head.path(), record);
        if let Ok(Route::Servers) = routed {
            // Operators have a key of their own.
            match self.access.may_administrate(client.peer(), &head.fields) {
                // What operators do is seldom and slow, and not to make every request's future larger.
                Ok(()) => return Box::pin(self.order(head, client)).await,
                Err(error) => routed = Err(error.into()),
            }
        } else if !is_preflight && !needs_no_key(&routed) {
            routed = terms.check().map_err(Error::from).and(routed);
        }
        terms.change(&mut head.fields);
        if let Ok(Route::Proxy(dialect)) = routed {
            match self.admit(client, record.begun()).await {
                Ok(None) => return Ok(None),
                Ok(Some((held, seats))) => {
                    self.reporter.trace(head, record);
                    let asked = self.proxy.read(dialect, head, client, record, timer).await?;
                    // Pinned here: handed on by value, it would be copied at every step on the way.
                    let answering = pin!(self.proxy.answer(&asked, seats, record, timer));
                    let answer = client.cancel_on_disconnect(answering).await.transpose()?;
                    return Ok(answer.map(|answer| HandlerResult::Relayed(answer, held)));
                }
                Err(error) => routed = Err(error),
            }
        }
        let refused = matches!(routed, Err(Error::Unauthorized | Error::Overloaded(_)));
        // A client that waits for our word before it sends its body need not send it in vain.
        if !(refused && head.fields.has(HeaderId::Expect)) {
            discard(client, self.live.limits().load().body_idle_timeout, timer).await?;
        }
        match routed {
            // Boxed, so that requests of the other kind are not as large.
            Ok(Route::RouterEndpoints(endpoint)) => Box::pin(self.ask(endpoint, head, client)).await,
            Ok(Route::Proxy(_) | Route::Servers) => unreachable!("handled above"),
            Err(Error::MethodNotAllowed { allow }) if is_preflight => {
                Ok(Some(HandlerResult::Own(preflight(allow, &head.fields))))
            }
            Err(error) => Err(error),
        }
    }

    /// Answers at an endpoint that does not generate.
    async fn ask(
        &self,
        endpoint: RouterEndpoint,
        head: &RequestHead,
        client: &mut impl ClientTransport,
    ) -> Result<Option<HandlerResult>, Error> {
        let timeout = self.live.limits().load().request_timeout;
        let reply = client.cancel_on_disconnect(self.control.handle(endpoint, head.clone(), timeout)).await;
        Ok(reply.transpose()?.map(HandlerResult::Own))
    }

    /// Does what an operator asks for.
    async fn order(
        &self,
        head: &RequestHead,
        client: &mut impl ClientTransport,
    ) -> Result<Option<HandlerResult>, Error> {
        let body = admin_body::read(client).await?;
        let reply = client.cancel_on_disconnect(self.servers.handle(head, body)).await;
        Ok(reply.transpose()?.map(HandlerResult::Own))
    }

    /// Lets a generation request in when it is its turn. Its body is unread until then, so that a queue costs little.
    /// `None`: the client did not wait.
    async fn admit(
        &self,
        upload: &impl RequestBody,
        now: Instant,
    ) -> Result<Option<(Held, Option<AdmittedPair>)>, Error> {
        if !self.entrance.gate().is_on() {
            return Ok(Some((None, None)));
        }
        let take = || {
            let caps = self.entrance.gate().caps();
            if caps == BackendCaps::NONE {
                return Ok(Some(None));
            }
            let seats = self.fleet.now().seats(caps, &self.entrance).map_err(Error::NoServer)?;
            let seated = |seats| AdmittedPair { seats, entrance: Arc::clone(&self.entrance) };
            Ok(seats.map(|seats| Some(seated(seats))))
        };
        let mut waiting = None;
        let entered = self.entrance.enter(now, take, || waiting = Some(self.queue.enter()));
        tokio::select! {
            biased;
            entered = entered => {
                if let Err(Error::Overloaded(refusal)) = &entered {
                    self.queue.refuse(refusal);
                }
                entered.map(|(place, seats)| Some((Some(place), seats)))
            }
            () = upload.disconnected() => Ok(None),
        }
    }
}

/// Whoever watches over the router has no key of its clients'.
fn needs_no_key(routed: &Result<Route, Error>) -> bool {
    matches!(routed, Ok(Route::RouterEndpoints(RouterEndpoint::Health | RouterEndpoint::Ready)))
}

/// The answer to a browser's question about a path.
fn preflight(allow: &'static str, asked: &RawHeaders) -> OwnResponse {
    let mut reply = OwnResponse::default();
    *reply.status_mut() = StatusCode::NO_CONTENT;
    *reply.headers_mut() = CorsDecision::preflight(allow, asked);
    reply
}

/// A panic ends the request that it happens in, and nothing else of the worker's.
async fn catch_panic<T>(mut answering: Pin<&mut impl Future<Output = Result<T, Error>>>) -> Result<T, Error> {
    std::future::poll_fn(|cx| {
        // Nothing of it is used again: it is dropped, and the connection is closed.
        let polled = catch_unwind(AssertUnwindSafe(|| answering.as_mut().poll(cx)));
        polled.unwrap_or(Poll::Ready(Err(Error::Internal)))
    })
    .await
}

/// Finds the route, and tells `record` of it, whether the method is one of its or not.
fn route(method: &Method, path: &str, record: &mut Record) -> Result<Route, Error> {
    let (route, allow) = match path {
        "/generate" => (Route::Proxy(Dialect::Generate), "POST, PUT"),
        "/v1/chat/completions" => (Route::Proxy(Dialect::Chat), "POST"),
        "/v1/completions" => (Route::Proxy(Dialect::Completions), "POST"),
        _ => match RouterEndpoint::at(path) {
            Some(endpoint) => (Route::RouterEndpoints(endpoint), endpoint.allow()),
            None => (Route::Servers, admin::WorkersApi::allow(path).ok_or(Error::NotFound)?),
        },
    };
    record.is(kind(&route));
    if allows(allow, method) { Ok(route) } else { Err(Error::MethodNotAllowed { allow }) }
}

fn kind(route: &Route) -> Endpoint {
    match route {
        Route::Proxy(dialect) => (*dialect).into(),
        Route::RouterEndpoints(RouterEndpoint::Health) => Endpoint::Health,
        Route::RouterEndpoints(RouterEndpoint::Ready) => Endpoint::Ready,
        Route::RouterEndpoints(RouterEndpoint::HealthGenerate) => Endpoint::HealthGenerate,
        Route::RouterEndpoints(RouterEndpoint::FlushCache) => Endpoint::FlushCache,
        Route::RouterEndpoints(RouterEndpoint::ServerInfo) => Endpoint::ServerInfo,
        Route::RouterEndpoints(RouterEndpoint::FromOne) => Endpoint::ModelInfo,
        Route::Servers => Endpoint::Workers,
    }
}
