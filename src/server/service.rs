//! Answers requests: finds the route, reads what is wanted of the body, and survives a panic.

use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Instant;

use hyper::{Method, StatusCode};

use super::answer::Answer;
use super::live::Live;
use super::order;
use super::workers::Common;
use crate::access::{Access, Shared, Terms};
use crate::config::Options;
use crate::control::{self, Control, Draining, Endpoint, allows};
use crate::error::{Error, Reply};
use crate::gate::{Caps, Entrance, Place};
use crate::metrics::{Queue, WorkerMetrics};
use crate::proxy::{self, Proxy, Seated, Upload, discard};
use crate::record::{Kind, Record, Recorder};
use crate::report::Reporter;
use crate::timer::Timer;
use crate::upstream::{LiveFleet, Pools};
use crate::wire::message::{ClientHead, Fields, Known};
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

/// A client whose request is read and answered.
pub(crate) trait Client: Upload + Send {
    /// Who it is.
    fn peer(&self) -> Option<SocketAddr>;

    /// Waits for what it is answered with, unless it leaves.
    fn unless_left<T: Send>(
        &mut self,
        answer: impl Future<Output = T> + Send,
    ) -> impl Future<Output = Option<T>> + Send;
}

/// A request that is to be answered.
struct Asked<'a> {
    head: &'a mut ClientHead,
    /// It is a browser's question.
    is_preflight: bool,
    timer: &'a mut Timer,
}

/// What came of a request.
enum Outcome {
    Relayed(proxy::Answer, Held),
    Own(Reply),
}

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

    /// Reads a request, or as much of it as is wanted, and answers it, whatever happens. `None`: its client has left.
    pub(super) async fn answer(
        &self,
        mut head: ClientHead,
        client: &mut impl Client,
        timer: &mut Timer,
    ) -> Option<Answer> {
        let mut record = self.recorder.begin();
        self.reporter.name(&mut head, &mut record);
        let mut terms = self.access.terms(&head.fields);
        let is_preflight = head.method == Method::OPTIONS && terms.shared.answers_preflight(&head.fields);
        let outcome = {
            let asked = Asked { head: &mut head, is_preflight, timer };
            let answering = self.try_answer(asked, client, &mut terms, &mut record);
            unless_it_panics(pin!(answering)).await.transpose()?
        };
        let mut answer = match outcome {
            Ok(Outcome::Relayed(answer, place)) => Answer::relayed(answer, place, record),
            Ok(Outcome::Own(reply)) => Answer::own(reply, record),
            Err(error) => Answer::error(&error, record),
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
        Asked { head, is_preflight, timer }: Asked<'_>,
        client: &mut impl Client,
        terms: &mut Terms,
        record: &mut Record,
    ) -> Result<Option<Outcome>, Error> {
        if let Some(flaw) = head.flaw {
            return Err(Error::BadRequest(flaw));
        }
        let mut routed = route(&head.method, head.path(), record);
        if let Ok(Route::Servers) = routed {
            // Operators have a key of their own.
            match self.access.may_administrate(client.peer(), &head.fields) {
                // What operators do is seldom and slow, and not to make every request's future larger.
                Ok(()) => return Box::pin(self.order(head, client)).await,
                Err(error) => routed = Err(error),
            }
        } else if !is_preflight && !needs_no_key(&routed) {
            routed = terms.check().and(routed);
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
                    let answer = client.unless_left(answering).await.transpose()?;
                    return Ok(answer.map(|answer| Outcome::Relayed(answer, held)));
                }
                Err(error) => routed = Err(error),
            }
        }
        let refused = matches!(routed, Err(Error::Unauthorized | Error::Overloaded(_)));
        // A client that waits for our word before it sends its body need not send it in vain.
        if !(refused && head.fields.has(Known::Expect)) {
            discard(client, self.live.limits().load().body_idle_timeout, timer).await?;
        }
        match routed {
            // Boxed, so that requests of the other kind are not as large.
            Ok(Route::Control(endpoint)) => Box::pin(self.ask(endpoint, head, client)).await,
            Ok(Route::Proxy(_) | Route::Servers) => unreachable!("handled above"),
            Err(Error::MethodNotAllowed { allow }) if is_preflight => {
                Ok(Some(Outcome::Own(preflight(allow, &head.fields))))
            }
            Err(error) => Err(error),
        }
    }

    /// Answers at an endpoint that does not generate.
    async fn ask(
        &self,
        endpoint: Endpoint,
        head: &ClientHead,
        client: &mut impl Client,
    ) -> Result<Option<Outcome>, Error> {
        let timeout = self.live.limits().load().request_timeout;
        let reply = client.unless_left(self.control.handle(endpoint, head.clone(), timeout)).await;
        Ok(reply.transpose()?.map(Outcome::Own))
    }

    /// Does what an operator asks for.
    async fn order(&self, head: &ClientHead, client: &mut impl Client) -> Result<Option<Outcome>, Error> {
        let body = order::read(client).await?;
        let reply = client.unless_left(self.servers.handle(head, body)).await;
        Ok(reply.transpose()?.map(Outcome::Own))
    }

    /// Lets a generation request in when it is its turn. Its body is unread until then, so that a queue costs little.
    /// `None`: the client did not wait.
    async fn admit(
        &self,
        upload: &impl Upload,
        now: Instant,
    ) -> Result<Option<(Held, Option<Seated>)>, Error> {
        if !self.entrance.gate().is_on() {
            return Ok(Some((None, None)));
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
        let entered = self.entrance.enter(now, take, || waiting = Some(self.queue.enter()));
        tokio::select! {
            biased;
            entered = entered => {
                if let Err(Error::Overloaded(refusal)) = &entered {
                    self.queue.refuse(refusal);
                }
                entered.map(|(place, seats)| Some((Some(place), seats)))
            }
            () = upload.left() => Ok(None),
        }
    }
}

/// Whoever watches over the router has no key of its clients'.
fn needs_no_key(routed: &Result<Route, Error>) -> bool {
    matches!(routed, Ok(Route::Control(Endpoint::Health | Endpoint::Ready)))
}

/// The answer to a browser's question about a path.
fn preflight(allow: &'static str, asked: &Fields) -> Reply {
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
