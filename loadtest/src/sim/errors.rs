//! The error responses of each API: the shapes of SGLang's servers for the same fault. Which fault a request
//! has is decided elsewhere.

use super::{request::Endpoint, response::SimResponse};

/// What `/v1/responses` says of anything that needs the store of earlier responses.
const NO_STORE: &str = "Response store is disabled. Stateful Responses require --enable-response-store on a \
                        standalone server; response storage is unavailable in PD mode.";

/// An invalid value.
pub(crate) fn value(endpoint: Endpoint, message: &str) -> SimResponse {
    match endpoint {
        Endpoint::Generate => SimResponse::value_error(message),
        Endpoint::Chat | Endpoint::Completions => SimResponse::object_error(400, "BadRequestError", message),
        Endpoint::Responses => SimResponse::nested_error(400, "invalid_request_error", None, message),
        Endpoint::Messages => SimResponse::anthropic_error(400, "BadRequestError", message),
    }
}

/// A generation that failed.
pub(crate) fn failure(endpoint: Endpoint, status: u16, message: &str) -> SimResponse {
    match (status, endpoint) {
        (400, _) => value(endpoint, message),
        (_, Endpoint::Responses) => SimResponse::nested_error(status, &status.to_string(), None, message),
        // Messages of 5xx never leave the server.
        (_, Endpoint::Messages) => SimResponse::anthropic_error(status, "api_error", "Internal server error"),
        _ => SimResponse::object_error(status, &status.to_string(), message),
    }
}

/// A body that violates the endpoint's schema.
pub(crate) fn validation(endpoint: Endpoint, text: &str) -> SimResponse {
    let path = match endpoint {
        Endpoint::Generate => "/generate",
        Endpoint::Chat => "/v1/chat/completions",
        Endpoint::Completions => "/v1/completions",
        Endpoint::Responses => "/v1/responses",
        Endpoint::Messages => return SimResponse::anthropic_error(400, "invalid_request_error", text),
    };
    schema(endpoint, &format!("1 validation error:\n  {text}\n\n  POST {path} [{text}]"))
}

/// The body is not declared as JSON.
pub(crate) fn content_type(endpoint: Endpoint) -> SimResponse {
    if endpoint == Endpoint::Generate {
        let text = "{'type': 'dataclass_type', 'loc': ('body',), 'msg': 'Input should be a dictionary or an \
                    instance of GenerateReqInput'}";
        return validation(endpoint, text);
    }
    let text = "{'loc': ['header', 'content-type'], 'msg': \"Unsupported Media Type: Only 'application/json' is \
                allowed\", 'type': 'value_error'}";
    schema(endpoint, &format!("1 validation error:\n  {text} [{text}]"))
}

fn schema(endpoint: Endpoint, message: &str) -> SimResponse {
    match endpoint {
        Endpoint::Responses => SimResponse::nested_error(400, "Bad Request", None, message),
        Endpoint::Messages => SimResponse::anthropic_error(400, "invalid_request_error", message),
        _ => SimResponse::object_error(400, "Bad Request", message),
    }
}

/// A model that `/v1/responses` does not know; the other APIs take any name.
pub(crate) fn unknown_model(name: &str) -> SimResponse {
    let message = format!("The model '{name}' does not exist");
    SimResponse::nested_error(404, "invalid_request_error", Some("model"), &message)
}

/// A field of `/v1/responses`, or of its path, that names an earlier response.
pub(crate) fn no_store(field: &str) -> SimResponse {
    SimResponse::nested_error(400, "invalid_request_error", Some(field), NO_STORE)
}
