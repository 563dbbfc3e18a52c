//! Access rules and concurrency limits, shared by all workers and changed by a reload.

use std::sync::Arc;

use crate::admission::{AccessControl, AccessOptions};
use crate::admission::{AdmissionController, AdmissionOptions};

/// What is decided about a request before its body is read.
#[derive(Clone)]
pub(crate) struct Admission {
    pub(crate) access: Arc<AccessControl>,
    pub(crate) gate: Arc<AdmissionController>,
}

impl Admission {
    pub(crate) fn new(access: AccessOptions, gate: &AdmissionOptions) -> Self {
        Self { access: Arc::new(AccessControl::new(access)), gate: Arc::new(AdmissionController::new(gate)) }
    }

    /// Replaces keys and limits, for requests that begin from now on.
    pub(crate) fn reload(&self, access: AccessOptions, gate: &AdmissionOptions) {
        self.access.reload(access);
        self.gate.reload(gate);
    }
}
