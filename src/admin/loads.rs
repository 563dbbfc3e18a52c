//! The response of `/v1/loads`: the loads of all servers in one document, as JSON or for Prometheus.

use std::collections::HashMap;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};
use serde_json::json;
use serde_json::value::RawValue;

use super::failures::BackendFailure;
use super::operators::METRICS_TYPE;
use super::query::QueryResponse;
use super::server_info::{NOT_JSON, description, list};
use crate::error::{OwnResponse, json_response};

/// Merges the servers' JSON: `loads` has the elements of all of them, each with its server. 502 only if no
/// server answered.
pub(super) fn merged(responses: &[QueryResponse]) -> OwnResponse {
    let elements: Vec<Option<Vec<String>>> = responses.iter().map(loads).collect();
    let failed = responses.iter().zip(&elements).filter(|(_, elements)| elements.is_none());
    let failed: Vec<_> =
        failed.map(|(response, _)| failure(response, NOT_JSON).to_json().to_string()).collect();
    let status = status(failed.len(), responses);
    let loads = list(elements.into_iter().flatten().flatten());
    json_response(status, format!(r#"{{"loads":{loads},"failed":{}}}"#, list(failed.iter())))
}

/// The elements of one server's `loads`, which begin with its URL and role.
fn loads(response: &QueryResponse) -> Option<Vec<String>> {
    let fields: HashMap<String, &RawValue> = serde_json::from_str(description(response)?.get()).ok()?;
    let elements: Vec<&RawValue> = serde_json::from_str(fields.get("loads")?.get()).ok()?;
    let (url, role) = (json!(response.server.url()), response.server.role());
    // Put together as text: a parse and a second serialization would change numbers such as 1e3 or 1.0.
    let with_server = |element: &RawValue| {
        let rest = element.get().strip_prefix('{')?.trim_ascii_start();
        let comma = if rest == "}" { "" } else { "," };
        Some(format!(r#"{{"server":{url},"role":"{role}"{comma}{rest}"#))
    };
    elements.into_iter().map(with_server).collect()
}

/// Merges the servers' texts for Prometheus. Each sample gets the labels `server` and `role`: those of two
/// servers would be the same series, which Prometheus rejects. A metric's samples stand together, as the
/// format demands.
pub(super) fn exposition(responses: &[QueryResponse]) -> OwnResponse {
    let mut metrics = Exposition::default();
    let mut failed = String::new();
    let mut failures = 0;
    for response in responses {
        match text(response) {
            Some(text) => metrics.add(text, response.server.url(), response.server.role().as_str()),
            None => {
                failures += 1;
                let failure = failure(response, "the response is not a text for Prometheus").to_json();
                // JSON has no line breaks, which would end the comment.
                failed += &format!("# failed: {failure}\n");
            }
        }
    }
    let mut response = Response::new(Full::new(Bytes::from(failed + &metrics.into_text()).into()));
    *response.status_mut() = status(failures, responses);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(METRICS_TYPE));
    response
}

/// A server's text. One that does not know the format answers JSON.
fn text(response: &QueryResponse) -> Option<&str> {
    let (head, body) = response.result.as_ref().ok()?;
    let is_text = head.status.is_success() && !body.trim_ascii_start().starts_with(b"{");
    std::str::from_utf8(body).ok().filter(|_| is_text)
}

fn failure<'a>(response: &'a QueryResponse, reason: &str) -> BackendFailure<'a> {
    BackendFailure::of(response).unwrap_or_else(|| BackendFailure::in_success(response, reason))
}

/// 502 only if no server has an answer: monitoring must work while one of them is down.
fn status(failed: usize, responses: &[QueryResponse]) -> StatusCode {
    if failed == responses.len() { StatusCode::BAD_GATEWAY } else { StatusCode::OK }
}

/// Metrics of several servers, in the order in which they first appear.
#[derive(Default)]
struct Exposition<'a> {
    metrics: Vec<MetricText<'a>>,
    by_name: HashMap<&'a str, usize>,
}

/// The lines of one metric.
#[derive(Default)]
struct MetricText<'a> {
    /// `HELP` and `TYPE` with their lines, of the first server that has them.
    comments: Vec<(&'a str, &'a str)>,
    samples: String,
}

impl<'a> Exposition<'a> {
    fn add(&mut self, text: &'a str, server: &str, role: &str) {
        let labels = format!("server={},role=\"{role}\"", json!(server));
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let Some(comment) = line.strip_prefix('#') else {
                let name = &line[..line.find(['{', ' ', '\t']).unwrap_or(line.len())];
                let metric = self.metric(name);
                metric.samples += &with_labels(line, name.len(), &labels);
                continue;
            };
            let mut words = comment.split_ascii_whitespace();
            let (Some(kind @ ("HELP" | "TYPE")), Some(name)) = (words.next(), words.next()) else { continue };
            let metric = self.metric(name);
            if !metric.comments.iter().any(|(known, _)| *known == kind) {
                metric.comments.push((kind, line));
            }
        }
    }

    fn metric(&mut self, name: &'a str) -> &mut MetricText<'a> {
        let index = *self.by_name.entry(name).or_insert_with(|| {
            self.metrics.push(MetricText::default());
            self.metrics.len() - 1
        });
        &mut self.metrics[index]
    }

    fn into_text(self) -> String {
        let mut text = String::new();
        for metric in self.metrics {
            for (_, line) in metric.comments {
                text += line;
                text.push('\n');
            }
            text += &metric.samples;
        }
        text
    }
}

/// A sample's line with further labels, in front of its own.
fn with_labels(line: &str, name: usize, labels: &str) -> String {
    let (name, rest) = line.split_at(name);
    match rest.strip_prefix('{') {
        Some(own) if own.trim_start().starts_with('}') => format!("{name}{{{labels}{own}\n"),
        Some(own) => format!("{name}{{{labels},{own}\n"),
        None => format!("{name}{{{labels}}}{rest}\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_of_one_metric_stand_together_with_their_server() {
        let mut metrics = Exposition::default();
        let text =
            "# HELP a First.\n# TYPE a gauge\na{dp_rank=\"0\"} 1\na{dp_rank=\"1\"} 2\n# TYPE b gauge\nb 3\n";
        metrics.add(text, "http://p:1", "prefill");
        metrics.add(
            "# HELP a Other.\n# TYPE a gauge\na{} 1.50\n\n# a comment\nc 4 1700",
            "http://d:1",
            "decode",
        );
        let p = r#"server="http://p:1",role="prefill""#;
        let d = r#"server="http://d:1",role="decode""#;
        let expected = [
            "# HELP a First.",
            "# TYPE a gauge",
            &format!(r#"a{{{p},dp_rank="0"}} 1"#),
            &format!(r#"a{{{p},dp_rank="1"}} 2"#),
            &format!("a{{{d}}} 1.50"),
            "# TYPE b gauge",
            &format!("b{{{p}}} 3"),
            &format!("c{{{d}}} 4 1700"),
            "",
        ];
        assert_eq!(metrics.into_text(), expected.join("\n"));
    }
}
