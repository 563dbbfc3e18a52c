//! What stands before requests: the gate and the rules of access, shared by all workers and changed by a reload.

use std::sync::Arc;

use crate::access::{Access, AccessOptions};
use crate::gate::{Gate, GateOptions};

/// Who may ask, and who may begin.
#[derive(Clone)]
pub(crate) struct Guards {
    pub(crate) access: Arc<Access>,
    pub(crate) gate: Arc<Gate>,
}

impl Guards {
    pub(crate) fn new(access: AccessOptions, gate: &GateOptions) -> Self {
        Self { access: Arc::new(Access::new(access)), gate: Arc::new(Gate::new(gate)) }
    }

    /// Takes other keys and limits over, while requests go on.
    pub(crate) fn reload(&self, access: AccessOptions, gate: &GateOptions) {
        self.access.reload(access);
        self.gate.reload(gate);
    }
}
