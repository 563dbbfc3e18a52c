//! Access control and the admission controller, shared by all worker threads.
//!
//! Both decide in `admission`; this only holds them together for a reload.

use std::sync::Arc;

use crate::admission::{AccessControl, AccessOptions, AdmissionController, AdmissionOptions};

/// What decides about a request before its body is read.
#[derive(Clone)]
pub(crate) struct Admission {
    pub(crate) access: Arc<AccessControl>,
    pub(crate) controller: Arc<AdmissionController>,
}

impl Admission {
    pub(crate) fn new(access: AccessOptions, limits: &AdmissionOptions) -> Self {
        Self {
            access: Arc::new(AccessControl::new(access)),
            controller: Arc::new(AdmissionController::new(limits)),
        }
    }

    /// Replaces keys and limits. Requests that were admitted keep their permits; those
    /// that wait see the new limits.
    pub(crate) fn reload(&self, access: AccessOptions, limits: &AdmissionOptions) {
        self.access.reload(access);
        self.controller.reload(limits);
    }
}
