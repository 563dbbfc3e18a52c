//! Requests other than generation: probes by routers, and the plan.

use std::time::Duration;

use super::{Plan, Role, Shared, responses::sized};

const MODELS: &str = r#"{"object":"list","data":[{"id":"tiny","object":"model","created":1795347733,"owned_by":"sglang","root":"tiny"}]}"#;

pub(super) fn respond(shared: &Shared, method: &str, target: &str) -> Vec<u8> {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    match path {
        "/canned" => {
            if method == "PUT" {
                shared.set(parse_plan(query));
            }
            sized(&serde_json::to_string(&shared.counts()).unwrap_or_default())
        }
        "/get_server_info" | "/server_info" | "/get_model_info" | "/model_info" => sized(&info(shared.role)),
        "/v1/models" => sized(MODELS),
        _ => sized(""),
    }
}

/// Parses the query of `PUT /canned`. Parameters that are missing are as in [`Plan::default`].
fn parse_plan(query: &str) -> Plan {
    let mut plan = Plan::default();
    for (name, value) in query.split('&').filter_map(|pair| pair.split_once('=')) {
        let value: u32 = value.parse().unwrap_or(0);
        match name {
            "tokens" => plan.tokens = value,
            "interval_us" => plan.interval = Duration::from_micros(value.into()),
            "single_write" => plan.single_write = value > 0,
            "prefill_delay_ms" => plan.prefill_delay = Duration::from_millis(value.into()),
            "prompt_tokens" => plan.prompt_tokens = value,
            "paired" => plan.paired = value > 0,
            _ => {}
        }
    }
    plan
}

impl Plan {
    /// The request target that sets this plan on a running server.
    pub fn target(&self) -> String {
        let Self { tokens, interval, single_write, prefill_delay, prompt_tokens, paired } = self;
        let [single_write, paired] = [single_write, paired].map(|switch| u8::from(*switch));
        let (interval, delay) = (interval.as_micros(), prefill_delay.as_millis());
        format!(
            "/canned?tokens={tokens}&interval_us={interval}&single_write={single_write}&prefill_delay_ms={delay}&prompt_tokens={prompt_tokens}&paired={paired}"
        )
    }
}

/// What routers ask a server before they send it a request.
fn info(role: Role) -> String {
    let role = role.name();
    format!(
        r#"{{"model_path":"tiny","tokenizer_path":"tiny","served_model_name":"tiny","is_generation":true,"disaggregation_mode":"{role}","dp_size":1,"tp_size":1,"version":"0.5.10"}}"#
    )
}
