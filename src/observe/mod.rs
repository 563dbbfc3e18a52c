//! What is known of requests while they run and after they have ended.
//!
//! [`record`] notes what happens to one request and shows it once, as a
//! [`CompletedRequest`](record::CompletedRequest), when it is over. [`metrics`] counts it and
//! [`report`] writes its log line and its spans; neither is known to the code that serves requests.

pub(crate) mod metrics;
pub(crate) mod record;
pub(crate) mod report;
