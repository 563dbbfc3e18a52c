//! What stands before requests: the gate and the rules of access, shared by all workers and changed by a reload.

use std::sync::Arc;

use crate::admission::{AccessControl, AccessOptions};
use crate::admission::{AdmissionController, AdmissionOptions};

/// Who may ask, and who may begin.
#[derive(Clone)]
pub(crate) struct Admission {
    pub(crate) access: Arc<AccessControl>,
    pub(crate) gate: Arc<AdmissionController>,
}

impl Admission {
    pub(crate) fn new(access: AccessOptions, gate: &AdmissionOptions) -> Self {
        Self { access: Arc::new(AccessControl::new(access)), gate: Arc::new(AdmissionController::new(gate)) }
    }

    /// Takes other keys and limits over, while requests go on.
    pub(crate) fn reload(&self, access: AccessOptions, gate: &AdmissionOptions) {
        self.access.reload(access);
        self.gate.reload(gate);
    }
}
