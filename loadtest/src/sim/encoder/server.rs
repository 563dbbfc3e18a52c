//! The routes of an encoder (`--encoder-only`) with zmq transfer: there are no others, not even `/v1/models`.

use hyper::Method;
use serde_json::{Value, json};
use tokio::time;

use crate::sim::{response::SimResponse, state::State};

/// Answers a request to an encoder.
pub(crate) async fn respond(state: &State, method: &Method, path: &str, body: &[u8]) -> SimResponse {
    let wanted = match path {
        "/encode" | "/scheduler_receive_url" => Method::POST,
        "/health" | "/health_generate" => Method::GET,
        _ => return SimResponse::detail(404, "Not Found"),
    };
    if *method != wanted {
        return SimResponse::detail(405, "Method Not Allowed");
    }
    match path {
        "/encode" => encode(state, body),
        "/scheduler_receive_url" => SimResponse::json("null"),
        _ => health(state).await,
    }
}

/// The real one encodes a dummy behind all that it has to encode, up to 30 s.
async fn health(state: &State) -> SimResponse {
    time::sleep(state.config.encoder.health_time).await;
    SimResponse::bare(state.encoding.health_failure().unwrap_or(200), "")
}

fn encode(state: &State, body: &[u8]) -> SimResponse {
    let request: Value = serde_json::from_slice(body).unwrap_or_default();
    if let Err(message) = check(&request) {
        return error(400, &message, &request);
    }
    match state.encoding.failure() {
        None => SimResponse::json("null"),
        Some(504) => error(504, "encoder batch timed out", &request),
        Some(503) => error(503, "encoder not ready", &request),
        Some(400) => error(400, "cannot identify image file", &request),
        Some(status) => error(status, "the encoder failed", &request),
    }
}

/// SGLang's checks, in its order.
fn check(request: &Value) -> Result<(), String> {
    let text = |name: &str| request.get(name).and_then(Value::as_str).filter(|text| !text.is_empty());
    text("req_id").ok_or("missing or invalid req_id")?;
    let modality = text("modality").ok_or("missing or invalid modality")?;
    if !["IMAGE", "VIDEO", "AUDIO"].contains(&modality) {
        return Err(format!("unsupported modality: {modality}"));
    }
    let items = request.get("mm_items").and_then(Value::as_array).filter(|items| !items.is_empty());
    items.ok_or("missing or empty mm_items")?;
    let number = |name: &str| request.get(name).and_then(Value::as_i64);
    let parts = number("num_parts").filter(|parts| *parts > 0);
    let parts = parts.ok_or("num_parts must be a positive integer")?;
    number("part_idx")
        .filter(|part| (0..parts).contains(part))
        .ok_or(format!("part_idx must be in [0, {parts})"))?;
    match request.get("hashes") {
        Some(Value::Object(_)) => Err("hashes must be list/scalar, got dict".to_owned()),
        _ => Ok(()),
    }
}

fn error(status: u16, message: &str, request: &Value) -> SimResponse {
    let body = json!({ "status": "error", "message": message, "req_id": request.get("req_id") });
    SimResponse::json(body.to_string()).with_status(status)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_encode_is_checked_as_sglang_does() {
        let good = json!({
            "req_id": "r_local_part_0", "modality": "IMAGE", "mm_items": ["data:"], "num_parts": 2,
            "part_idx": 1, "hashes": null,
        });
        assert_eq!(check(&good), Ok(()));
        for (name, value, message) in [
            ("req_id", json!(7), "missing or invalid req_id"),
            ("modality", Value::Null, "missing or invalid modality"),
            ("modality", json!("TEXT"), "unsupported modality: TEXT"),
            ("mm_items", json!([]), "missing or empty mm_items"),
            ("num_parts", json!(0), "num_parts must be a positive integer"),
            ("part_idx", json!(2), "part_idx must be in [0, 2)"),
            ("hashes", json!({}), "hashes must be list/scalar, got dict"),
        ] {
            let mut bad = good.clone();
            bad[name] = value;
            assert_eq!(check(&bad), Err(message.to_owned()));
        }
    }
}
