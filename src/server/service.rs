//! Answers requests, in these steps: authorize, admit, read, pick, send, relay.
//!
//! Which version of HTTP a request uses, and how the response is written, is not known here. What a
//! generation request means is known to the proxy.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use hyper::{Method, StatusCode};

use super::live_settings::LiveSettings;
use super::response::{self, ClientResponseBody};
use super::routes::{Route, merge_slashes};
use super::{admin_body, forwarded_body, rejection};
use crate::admin::{Access, BodyUse, Draining, RouterEndpoint, RouterEndpoints, RouterRequest, WorkersApi};
use crate::admission::{AccessControl, AdmissionHandle, AuthDecision, BackendCaps, CorsDecision, Permit};
use crate::error::{Error, OwnResponse};
use crate::http1::{HeadRejection, OutgoingBody, RawHeaders, RequestHead};
use crate::observe::metrics::{QueueMetrics, WorkerMetrics};
use crate::observe::record::{Record, Recorder};
use crate::observe::report::RequestLogger;
use crate::proxy::{AdmittedPair, Proxy, UpstreamResponse};
use crate::timer::Timer;
use crate::transport::{self, ClientResponse, ClientTransport, ConnectionHandler, RejectionResponse};
use crate::upstream::{LiveFleet, Pools};
use crate::wire::shape::Dialect;

/// What a worker answers requests with, made by [`worker_threads`](super::worker_threads).
pub(super) struct Service {
    pub(super) proxy: Proxy,
    pub(super) endpoints: RouterEndpoints,
    pub(super) workers_api: Arc<WorkersApi>,
    /// Swept by the worker.
    pub(super) pools: Arc<Pools>,
    pub(super) metrics: Arc<WorkerMetrics>,
    pub(super) recorder: Arc<Recorder>,
    pub(super) logger: Arc<RequestLogger>,
    pub(super) draining: Draining,
    pub(super) settings: Arc<LiveSettings>,
    pub(super) fleet: Arc<LiveFleet>,
    pub(super) admission: Arc<AdmissionHandle>,
    pub(super) queue_metrics: Arc<QueueMetrics>,
    pub(super) access: Arc<AccessControl>,
}

/// A request that is being answered.
struct Exchange<'a, C> {
    head: &'a mut RequestHead,
    client: &'a mut C,
    record: &'a mut Record,
    timer: &'a mut Timer,
    /// A browser asks by CORS whether a page may send the real request.
    is_preflight: bool,
    /// Whether it is an operator's, where that matters and clients may ask as well.
    is_operator: bool,
}

/// What a request is answered with.
enum HandlerResult {
    Relayed(UpstreamResponse, Option<Permit>),
    Own(OwnResponse),
    /// With nothing: the client has closed the connection.
    Disconnected,
}

/// What a generation request holds when it is admitted, before its body is read.
#[derive(Default)]
struct Admitted {
    /// Of the limit of concurrent requests, if there is one.
    permit: Option<Permit>,
    /// Its pair with a permit on each backend, if these are limited.
    pair: Option<AdmittedPair>,
}

impl ConnectionHandler for Service {
    type Body = ClientResponseBody;

    async fn respond<C: ClientTransport>(
        &self,
        client: &mut C,
        mut head: RequestHead,
        timer: &mut Timer,
    ) -> Option<ClientResponse<ClientResponseBody>> {
        let mut record = self.recorder.begin();
        self.logger.assign_request_id(&mut head, &mut record);
        if let Some(address) = client.proxied_for() {
            record.set_proxied_for(address);
        }
        let mut auth = self.access.authorize(&head.headers);
        let is_preflight = head.method == Method::OPTIONS && auth.cors.answers_preflight(&head.headers);
        let result = {
            let (head, record, is_operator) = (&mut head, &mut record, false);
            let exchange = Exchange { head, client, record, timer, is_preflight, is_operator };
            catch_panic(pin!(self.handle(exchange, &mut auth))).await
        };
        let mut response = match result {
            Ok(HandlerResult::Relayed(response, permit)) => response::relayed(response, permit, record),
            Ok(HandlerResult::Own(response)) => response::own(response, record),
            Ok(HandlerResult::Disconnected) => return None,
            Err(error) => response::error(&error, record),
        };
        if auth.cors.changes_response() {
            auth.cors.apply(&mut response.head, is_preflight);
        }
        Some(response)
    }

    fn is_draining(&self) -> bool {
        self.draining.has_begun()
    }

    fn reject(&self, rejection: HeadRejection) -> RejectionResponse {
        rejection::response(rejection, &self.recorder)
    }

    fn relayed(&self, time: Duration) {
        self.metrics.observe_relay(time);
    }
}

impl Service {
    /// Answers a request, or fails with the error that it is answered with.
    async fn handle<C: ClientTransport>(
        &self,
        mut exchange: Exchange<'_, C>,
        auth: &mut AuthDecision,
    ) -> Result<HandlerResult, Error> {
        if let Some(reason) = exchange.head.reject_reason {
            return Err(Error::BadRequest(reason));
        }
        // A reason to reject is found while parsing, but answered here: the request has an id and a log line
        // by now.
        match self.authorize(&mut exchange, auth) {
            Ok(Route::Generate(dialect, _)) => self.generate(dialect, exchange).await,
            // Boxed: these are few, and would make the future of a generation request larger.
            Ok(Route::Router(endpoint, _)) => Box::pin(self.ask(endpoint, exchange)).await,
            Ok(Route::Workers) => Box::pin(self.change_workers(exchange)).await,
            Err(error) => refuse(error, &exchange),
        }
    }

    /// Answers a generation request once it is authorized: admit, read, pick, send, relay.
    async fn generate<C: ClientTransport>(
        &self,
        dialect: Option<Dialect>,
        exchange: Exchange<'_, C>,
    ) -> Result<HandlerResult, Error> {
        let admitted = match self.admit(exchange.client, exchange.record.started_at()).await {
            Ok(Some(admitted)) => admitted,
            Ok(None) => return Ok(HandlerResult::Disconnected),
            Err(error) => return refuse(error, &exchange),
        };
        let Exchange { head, client, record, timer, .. } = exchange;
        self.logger.start_trace(head, record);
        let request = self.proxy.read(dialect, head, client, record, timer).await?;
        let response = if request.samples() > 1 {
            // Boxed: rare, and the future of other requests would be larger.
            let dispatch = self.proxy.fan_out(request, admitted.pair, &head.headers, record);
            client.cancel_on_disconnect(Box::pin(dispatch)).await.transpose()?
        } else {
            let (sample, prompt) = record.sample_and_prompt();
            let dispatch = self.proxy.dispatch(&request, request.own(), admitted.pair, prompt, sample, timer);
            // Pinned here: passed by value, the future would be copied at every step on the way.
            client.cancel_on_disconnect(pin!(dispatch)).await.transpose()?
        };
        Ok(response.map_or(HandlerResult::Disconnected, |response| {
            HandlerResult::Relayed(response, admitted.permit)
        }))
    }

    /// Finds the route of a request that may take it, and gives the request the key that servers are to see.
    fn authorize<C: ClientTransport>(
        &self,
        exchange: &mut Exchange<'_, C>,
        auth: &mut AuthDecision,
    ) -> Result<Route, Error> {
        let head = &mut *exchange.head;
        merge_slashes(head);
        let is_regular = || self.fleet.now().is_regular();
        let (endpoint, route) = Route::find(&head.method, head.path(), is_regular);
        exchange.record.set_endpoint(endpoint);
        match &route {
            // Operators have a key of their own.
            Ok(Route::Workers) => {
                self.access.check_admin(exchange.client.origin().direct_peer(), &head.headers)?;
                return route;
            }
            Ok(Route::Router(_, Access::Operators)) => {
                self.access.check_admin(exchange.client.origin().direct_peer(), &head.headers)?;
                self.access.replace_admin_key(&mut head.headers);
                return route;
            }
            Ok(Route::Router(_, Access::ClientsAndOperators)) => {
                exchange.is_operator =
                    self.access.check_admin(exchange.client.origin().direct_peer(), &head.headers).is_ok();
                if exchange.is_operator && self.access.has_admin_key() {
                    self.access.replace_admin_key(&mut head.headers);
                    return route;
                }
                auth.check()?;
            }
            // A load balancer that probes the router has no key.
            Ok(Route::Router(_, Access::Everyone)) => {}
            // A browser sends no key with a preflight request (Fetch, section 4.8).
            _ if exchange.is_preflight => {}
            // Before 404 and 405: without a key, nothing is told of which paths exist.
            _ => auth.check()?,
        }
        auth.replace_authorization(&mut head.headers);
        route
    }

    /// Admits a generation request when it is its turn. Its body is unread until then, so that a queue costs
    /// little memory. `None`: the client left the queue.
    async fn admit(
        &self,
        client: &mut impl ClientTransport,
        started_at: Instant,
    ) -> Result<Option<Admitted>, Error> {
        if !self.admission.controller().is_enabled() {
            return Ok(Some(Admitted::default()));
        }
        let mut waiting = None;
        let admission = self.admission.admit(
            started_at,
            || self.take_pair(),
            || waiting = Some(self.queue_metrics.start_wait()),
        );
        tokio::select! {
            // Biased: if both are ready the request is admitted, and the next wait notices the close.
            biased;
            admitted = admission => match admitted {
                Ok((permit, pair)) => Ok(Some(Admitted { permit: Some(permit), pair })),
                Err(error) => {
                    if let Error::Overloaded(rejection) = &error {
                        self.queue_metrics.count_rejection(rejection);
                    }
                    Err(error)
                }
            },
            () = client.disconnected() => Ok(None),
        }
    }

    /// Acquires permits on a prefill and a decode server, if these are limited. The outer `None`: all are at
    /// their limit.
    fn take_pair(&self) -> Result<Option<Option<AdmittedPair>>, Error> {
        let caps = self.admission.controller().caps();
        if caps == BackendCaps::NONE {
            return Ok(Some(None));
        }
        let permits = self.fleet.now().acquire_pair(caps, &self.admission).map_err(Error::NoServer)?;
        let admission = || Arc::clone(&self.admission);
        Ok(permits.map(|permits| Some(AdmittedPair { permits, admission: admission() })))
    }

    /// Answers at an endpoint that does not generate.
    async fn ask<C: ClientTransport>(
        &self,
        endpoint: RouterEndpoint,
        exchange: Exchange<'_, C>,
    ) -> Result<HandlerResult, Error> {
        let Exchange { head, client, timer, is_operator, .. } = exchange;
        let limits = self.settings.limits().load_full();
        // Before and not after the response: what the client sends next would hide that it has left.
        let (body, _reservation) = match endpoint.body_use() {
            BodyUse::Discarded => {
                transport::discard(client, limits.body_timeouts, timer).await?;
                (OutgoingBody::default(), None)
            }
            BodyUse::Parsed => (OutgoingBody::new(vec![admin_body::read(client).await?]), None),
            BodyUse::Forwarded => {
                let (body, reservation) =
                    forwarded_body::read(client, &limits, &self.admission, timer).await?;
                (body, Some(reservation))
            }
        };
        let request = RouterRequest { head: head.clone(), body, is_operator };
        own(client.cancel_on_disconnect(self.endpoints.handle(endpoint, request)).await)
    }

    /// Lists or changes servers, for an operator.
    async fn change_workers<C: ClientTransport>(
        &self,
        exchange: Exchange<'_, C>,
    ) -> Result<HandlerResult, Error> {
        let Exchange { head, client, .. } = exchange;
        let body = admin_body::read(client).await?;
        own(client.cancel_on_disconnect(self.workers_api.handle(head, body)).await)
    }
}

fn own(response: Option<Result<OwnResponse, Error>>) -> Result<HandlerResult, Error> {
    Ok(response.transpose()?.map_or(HandlerResult::Disconnected, HandlerResult::Own))
}

/// Fails with `error`, which is answered at once: the client may be sending a body, or wait before it does.
fn refuse<C>(error: Error, exchange: &Exchange<'_, C>) -> Result<HandlerResult, Error> {
    match error {
        Error::MethodNotAllowed { allow } if exchange.is_preflight => {
            Ok(HandlerResult::Own(preflight(allow, &exchange.head.headers)))
        }
        error => Err(error),
    }
}

/// The response to a browser's preflight request.
fn preflight(allow: &'static str, asked: &RawHeaders) -> OwnResponse {
    let mut response = OwnResponse::default();
    *response.status_mut() = StatusCode::NO_CONTENT;
    *response.headers_mut() = CorsDecision::preflight(allow, asked);
    response
}

/// Makes a panic an error of the request that it happens in: nothing else of the worker's ends.
async fn catch_panic<T>(mut future: Pin<&mut impl Future<Output = Result<T, Error>>>) -> Result<T, Error> {
    std::future::poll_fn(|cx| {
        // Unwind safe: nothing of the request is used again, and its connection is closed.
        let polled = catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(cx)));
        polled.unwrap_or(Poll::Ready(Err(Error::Internal)))
    })
    .await
}
