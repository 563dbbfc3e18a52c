//! Why pods could not be listed or watched, in a sentence and as a label.

use std::error::Error;

use kube_core::Status;

use super::pod::shown;
use crate::observe::metrics::POD_WATCH_FAILURES;

/// What the router does with pods: the verbs of Kubernetes' RBAC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PodVerb {
    List,
    Watch,
}

impl PodVerb {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::List => "list",
            Self::Watch => "watch",
        }
    }
}

/// The kinds of failures, in the order of [`POD_WATCH_FAILURES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FailureReason {
    /// There is neither a usable kubeconfig nor a usable service account.
    Configuration,
    Unauthorized,
    Forbidden,
    /// The resource version is too old to watch from: pods have to be listed again, as happens now and then.
    Gone,
    Status,
    Unreachable,
    Timeout,
    Malformed,
}

impl FailureReason {
    pub(super) fn as_str(self) -> &'static str {
        POD_WATCH_FAILURES[self as usize]
    }
}

/// Why a request had no response that can be used.
#[derive(Debug)]
pub(super) enum ApiError {
    /// Nothing was sent: a file or a variable is missing or wrong.
    Configuration(String),
    /// No connection, or it ended.
    Unreachable(String),
    Timeout(String),
    /// The response is an error.
    Status(Box<Status>),
    Malformed(String),
}

impl ApiError {
    /// For an error of the connection.
    pub(super) fn unreachable(error: &dyn Error) -> Self {
        Self::Unreachable(chain(error))
    }
}

/// A list or a watch that failed.
#[derive(Debug)]
pub(super) struct PodWatchFailure {
    pub(super) verb: PodVerb,
    pub(super) reason: FailureReason,
    /// The reason, for people.
    pub(super) text: String,
}

impl PodWatchFailure {
    pub(super) fn new(verb: PodVerb, reason: FailureReason, text: impl Into<String>) -> Self {
        Self { verb, reason, text: text.into() }
    }

    /// The failure of a request.
    pub(super) fn of(verb: PodVerb, error: ApiError) -> Self {
        let (reason, text) = match error {
            ApiError::Status(status) => return Self::of_status(verb, &status),
            ApiError::Configuration(text) => (FailureReason::Configuration, text),
            ApiError::Unreachable(text) => (FailureReason::Unreachable, text),
            ApiError::Timeout(text) => (FailureReason::Timeout, text),
            // It may show what was received.
            ApiError::Malformed(text) => (FailureReason::Malformed, shown(&text)),
        };
        Self::new(verb, reason, text)
    }

    /// The failure that the API server has responded with, or sent as an event.
    pub(super) fn of_status(verb: PodVerb, status: &Status) -> Self {
        let (code, said) = (status.code, shown(&status.message));
        match code {
            401 => Self::new(
                verb,
                FailureReason::Unauthorized,
                format!("the API server does not accept the router's credentials (401): {said}"),
            ),
            403 => Self::new(
                verb,
                FailureReason::Forbidden,
                format!(
                    "RBAC does not allow the verb {} on pods there (403); the router's account needs get, list and \
                     watch: {said}",
                    verb.as_str()
                ),
            ),
            410 => {
                Self::new(verb, FailureReason::Gone, format!("the resource version is gone (410): {said}"))
            }
            // A body that is JSON, but no status.
            0 => Self::new(
                verb,
                FailureReason::Status,
                "the API server responded with an error without a code",
            ),
            _ => Self::new(verb, FailureReason::Status, format!("the API server responded {code}: {said}")),
        }
    }
}

/// An error and its causes, each once: many repeat the text of their cause.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    shown(&text)
}
