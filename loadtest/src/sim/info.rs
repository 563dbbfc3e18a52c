//! Endpoints other than generation: health, information, tokens, loads, cache, aborts. Bodies are recorded
//! from a real server, with this server's values filled in.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::{Duration, SystemTime},
};

use serde_json::Value;
use tokio::time::{self, Instant};

use super::{
    config::{DEFAULT_BOOTSTRAP_PORT, HEALTH_TIME, Role},
    json,
    prompt::Prompt,
    request::unix_time,
    response::SimResponse,
    state::State,
};

const SERVER_INFO: &str = include_str!("../../assets/server_info.json");
const MODEL_INFO: &str = include_str!("../../assets/model_info.json");
const FLUSHED: &str = "Cache flushed.\nPlease check backend logs for more details. (When there are running or \
                       waiting requests, the operation will not be performed.)\n";
/// How often a flush with a timeout checks whether the server is idle.
const FLUSH_POLL: Duration = Duration::from_millis(10);
/// Upper limit of that timeout, in seconds.
const FLUSH_WAIT_LIMIT: f64 = 3600.0;

/// `/health` and `/health_generate`: the real server generates a token, which takes about a second.
pub(crate) async fn health(state: &State) -> SimResponse {
    if state.draining.load(Ordering::Relaxed) {
        return SimResponse::bare(503, "");
    }
    time::sleep(state.config.scaled(HEALTH_TIME)).await;
    SimResponse::bare(200, "")
}

/// `/ready`: only checks flags.
pub(crate) fn ready(state: &State) -> SimResponse {
    SimResponse::bare(if state.draining.load(Ordering::Relaxed) { 503 } else { 200 }, "")
}

fn escaped(text: &str) -> String {
    let mut out = Vec::new();
    json::escape(&mut out, text);
    String::from_utf8(out).unwrap_or_default()
}

pub(crate) fn model_info(state: &State) -> SimResponse {
    let model = escaped(&state.config.model);
    let text = MODEL_INFO
        .replace("@PATH@", &format!("/models/{model}"))
        .replace("@MODEL@", &model)
        .replace("@ROLE@", state.config.role.name());
    SimResponse::json(text.trim_end().to_owned())
}

pub(crate) fn server_info(state: &State) -> SimResponse {
    let model = escaped(&state.config.model);
    let decode = state.config.role == Role::Decode;
    let bootstrap = state.bootstrap_port.unwrap_or(DEFAULT_BOOTSTRAP_PORT);
    let values = [
        ("@PATH@", format!("/models/{model}")),
        ("@MODEL@", model),
        ("@ROLE@", state.config.role.name().to_owned()),
        ("@PORT@", state.port().to_string()),
        ("@BOOTSTRAP_PORT@", bootstrap.to_string()),
        ("@BALANCE@", state.config.balance().name().to_owned()),
        ("@DP_SIZE@", state.config.dp_size.to_string()),
        ("@WITHOUT_CACHE@", (!state.config.has_prefix_cache()).to_string()),
        ("@BACKUP@", if decode { "\"cpu_tensor\"" } else { "null" }.to_owned()),
        ("@SLOTS@", if decode { "0" } else { "null" }.to_owned()),
        ("@HICACHE@", if decode { "null" } else { "2.0" }.to_owned()),
    ];
    let text = values
        .iter()
        .fold(SERVER_INFO.trim_end().to_owned(), |text, (mark, value)| text.replace(mark, value));
    // As in the recording, but for language-only servers.
    let Some(port) = state.config.encoder_bootstrap_port else { return SimResponse::json(text) };
    let text = text.replace("\"language_only\":false", "\"language_only\":true");
    let port = format!("\"encoder_bootstrap_port\":{port}");
    SimResponse::json(text.replace("\"encoder_bootstrap_port\":8997", &port))
}

fn model_card(state: &State) -> String {
    let model = escaped(&state.config.model);
    format!(
        "{{\"id\":\"{model}\",\"object\":\"model\",\"created\":{},\"owned_by\":\"sglang\",\"root\":\"{model}\",\
         \"parent\":null,\"max_model_len\":{}}}",
        unix_time() as u64,
        state.config.context_length
    )
}

pub(crate) fn models(state: &State) -> SimResponse {
    SimResponse::json(format!("{{\"object\":\"list\",\"data\":[{}]}}", model_card(state)))
}

pub(crate) fn model(state: &State, name: &str) -> SimResponse {
    if name == state.config.model {
        return SimResponse::json(model_card(state));
    }
    let body = format!(
        "{{\"error\":{{\"message\":\"The model '{}' does not exist\",\"type\":\"invalid_request_error\",\
         \"param\":\"model\",\"code\":\"model_not_found\"}}}}",
        escaped(name)
    );
    SimResponse::json(body).with_status(404)
}

/// `/v1/loads`, with this server's actual counts.
pub(crate) fn loads(state: &State) -> SimResponse {
    let read = |gauge: &AtomicI64| gauge.load(Ordering::Relaxed);
    let gauges = &state.gauges;
    let [bootstrap, inflight, prealloc, transfer, running] =
        [&gauges.bootstrap, &gauges.inflight, &gauges.prealloc, &gauges.transfer, &gauges.running].map(read);
    let waiting = bootstrap + prealloc + transfer;
    let moments = if state.config.role == Role::Prefill { "null" } else { "[0.0,0.0,0.0,0.0,0.0,0.0]" };
    SimResponse::json(format!(
        "{{\"timestamp\":\"{}\",\"version\":\"0.5.23\",\"accelerator\":null,\"num_accelerators\":1,\"loads\":[{{\
         \"timestamp\":{:.7},\"dp_rank\":0,\"num_running_reqs\":{running},\"num_waiting_reqs\":{waiting},\
         \"num_waiting_uncached_tokens\":0,\"num_used_tokens\":0,\"num_total_tokens\":0,\"num_active_tokens\":0,\
         \"num_prealloc_ready_tokens\":0,\"max_total_num_tokens\":20000,\"max_running_requests\":64,\
         \"token_usage\":0.0,\"gen_throughput\":0.0,\"cache_hit_rate\":0.0,\"utilization\":0.0,\
         \"total_prefill_uncached_tokens\":0,\"total_prefill_busy_us\":0,\"decode_moments\":{moments},\
         \"memory\":{{\"weight_gb\":0.0,\"kv_cache_gb\":0.005,\"graph_gb\":0.0,\"token_capacity\":20000}},\
         \"disaggregation\":{{\"mode\":\"{}\",\"prefill_bootstrap_queue_reqs\":{bootstrap},\
         \"prefill_inflight_queue_reqs\":{inflight},\"decode_prealloc_queue_reqs\":{prealloc},\
         \"decode_transfer_queue_reqs\":{transfer},\"decode_retracted_queue_reqs\":0,\
         \"kv_transfer_speed_gb_s\":0.0,\"kv_transfer_latency_ms\":0.0}},\"queues\":{{\"waiting\":0,\
         \"grammar\":0,\"paused\":0,\"retracted\":0,\"prealloc_ready\":0}}}}]}}",
        timestamp(),
        unix_time(),
        state.config.role.name()
    ))
}

/// The current time in ISO 8601 with microseconds, UTC.
fn timestamp() -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let (seconds, days) = (now.as_secs() % 86_400, (now.as_secs() / 86_400) as i64);
    // Days since the first of March of year 0, so that a leap day is the last day of a year.
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:06}+00:00",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        now.subsec_micros()
    )
}

/// `/flush_cache`: fails while anything is in flight, after waiting for `timeout` seconds.
pub(crate) async fn flush(state: &State, query: Option<&str>) -> SimResponse {
    let parameters = query.into_iter().flat_map(|query| query.split('&'));
    let wait =
        parameters.filter_map(|pair| pair.strip_prefix("timeout=")).find_map(|wait| wait.parse::<f64>().ok());
    let wait = wait.filter(|wait| wait.is_finite()).unwrap_or(0.0).clamp(0.0, FLUSH_WAIT_LIMIT);
    let deadline = Instant::now() + Duration::from_secs_f64(wait);
    while state.in_flight() > 0 {
        if Instant::now() >= deadline {
            return SimResponse::bare(400, "Flush cache failed.\n");
        }
        time::sleep(FLUSH_POLL).await;
    }
    SimResponse::bare(200, FLUSHED)
}

/// `/abort_request`: 200 whether the id is known or not.
pub(crate) fn abort(state: &Arc<State>, body: &[u8]) -> SimResponse {
    let Ok(fields) = serde_json::from_slice::<Value>(body) else {
        return SimResponse::object_error(400, "Bad Request", "1 validation error:\n  JSON decode error");
    };
    if fields.get("abort_all").and_then(Value::as_bool).unwrap_or(false) {
        state.abort_all();
    } else if let Some(rid) = fields.get("rid").and_then(Value::as_str) {
        state.abort(rid);
    }
    SimResponse::bare(200, "")
}

/// `/tokenize`: one token for each word.
pub(crate) fn tokenize(state: &State, body: &[u8]) -> SimResponse {
    let fields: Value = serde_json::from_slice(body).unwrap_or_default();
    let Some(prompt) = fields.get("prompt").and_then(Value::as_str) else {
        return SimResponse::object_error(400, "Bad Request", "1 validation error:\n  Field required");
    };
    let ids: Vec<u32> = Prompt::text(prompt.to_owned()).listing().into_iter().map(|(id, _)| id).collect();
    let (list, count, limit) = (Value::from(ids.clone()), ids.len(), state.config.context_length);
    SimResponse::json(format!("{{\"tokens\":{list},\"count\":{count},\"max_model_len\":{limit}}}"))
}

/// `/v1/messages/count_tokens`.
pub(crate) fn count_tokens(body: &[u8]) -> SimResponse {
    let fields: Value = serde_json::from_slice(body).unwrap_or_default();
    let Some(messages) = fields.get("messages") else {
        let body = "{\"type\":\"error\",\"error\":{\"type\":\"invalid_request_error\",\
                    \"message\":\"messages: Field required\"}}";
        return SimResponse::json(body).with_status(400);
    };
    SimResponse::json(format!("{{\"input_tokens\":{}}}", Prompt::messages(messages).tokens))
}

/// `/metrics`: the few series that clients read.
pub(crate) fn metrics(state: &State) -> SimResponse {
    let running = state.gauges.running.load(Ordering::Relaxed);
    let name = &state.config.model;
    let body = format!(
        "# HELP sglang:num_running_reqs The number of running requests.\n# TYPE sglang:num_running_reqs gauge\n\
         sglang:num_running_reqs{{model_name=\"{name}\"}} {running}.0\n"
    );
    let body = body + &rank_metrics(state);
    let mut response = SimResponse::bare(200, body);
    response.content_type = Some("text/plain; version=0.0.4; charset=utf-8");
    response
}

/// What each rank was given, if there are several.
fn rank_metrics(state: &State) -> String {
    let ranks = state.ranks.stats();
    if ranks.len() < 2 {
        return String::new();
    }
    let name = "sglang:num_requests_total";
    let mut text = format!("# HELP {name} Number of requests processed.\n# TYPE {name} counter\n");
    for (rank, stats) in ranks.iter().enumerate() {
        let (model, requests) = (&state.config.model, stats.requests);
        text += &format!("{name}{{dp_rank=\"{rank}\",model_name=\"{model}\"}} {requests}.0\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timestamp_is_iso_8601_in_utc() {
        let stamp = timestamp();
        assert_eq!(stamp.len(), "2026-11-22T11:42:11.082057+00:00".len());
        assert!(stamp.starts_with("20") && stamp.ends_with("+00:00"), "{stamp}");
    }
}
