//! Trace spans as a collector receives them. Without the feature `otel`: its flags are rejected.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions only, not in what they call")]

mod kit;

use kit::{RouterProcess, ScriptedServer, json};

const BODY: &[u8] = br#"{"text":"x"}"#;

#[cfg(not(feature = "otel"))]
mod without {
    use super::*;

    #[tokio::test]
    async fn trace_flags_are_rejected_by_name() {
        for args in [&["--otlp-traces-endpoint", "http://a:1"][..], &["--enable-trace"]] {
            let mut program = RouterProcess::spawn("http://a:1", "http://b:1", args);
            assert_eq!(program.exit_code().await, Some(2));
            let said = format!(
                "error: {} is not supported: this program was built without the feature otel; ",
                args[0]
            );
            assert!(program.lines()[0].starts_with(&said), "{:?}", program.lines());
        }
    }

    #[tokio::test]
    async fn traceparent_passes_unchanged() {
        let ok_server = || ScriptedServer::always(json("200 OK", "{}"));
        let (prefill, decode) = (ok_server().await, ok_server().await);
        let program = RouterProcess::between(&prefill, &decode, &[]).await;
        let mut client = program.client().await;
        client.send_request("POST", "/generate", &[("traceparent", "anything")], BODY).await;
        client.response().await;
        assert_eq!(decode.only_request().await.head.header("traceparent"), Some("anything"));
    }
}

#[cfg(feature = "otel")]
mod with {
    use std::collections::BTreeMap;

    use kit::{ReceivedRequest, Step};
    use serde_json::Value;

    use super::*;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    const PARENT: &str = "00f067aa0ba902b7";

    async fn ok_server() -> ScriptedServer {
        ScriptedServer::always(json("200 OK", "{}")).await
    }

    async fn collector() -> ScriptedServer {
        ScriptedServer::start(|_| vec![Step::Send(json("200 OK", "{}")), Step::Close]).await
    }

    /// All spans that a collector has received.
    fn spans(collector: &ScriptedServer) -> Vec<Value> {
        let each = |seen: ReceivedRequest| {
            assert_eq!(seen.target(), "/v1/traces");
            assert_eq!(seen.head.header("content-type"), Some("application/json"));
            let resource = seen.json()["resourceSpans"][0].clone();
            let service = &resource["resource"]["attributes"][0];
            assert_eq!(
                (&service["key"], &service["value"]["stringValue"]),
                (&"service.name".into(), &"mini-lb".into())
            );
            assert_eq!(resource["scopeSpans"][0]["scope"]["name"], "mini-lb");
            resource["scopeSpans"][0]["spans"].as_array().unwrap().clone()
        };
        collector.requests().into_iter().flat_map(each).collect()
    }

    fn attributes(span: &Value) -> BTreeMap<String, String> {
        let value = |value: &Value| match &value["stringValue"] {
            Value::String(text) => text.clone(),
            _ => value["intValue"].as_str().map_or_else(|| value["boolValue"].to_string(), str::to_owned),
        };
        let pairs = span["attributes"].as_array().unwrap().iter();
        pairs.map(|pair| (pair["key"].as_str().unwrap().to_owned(), value(&pair["value"]))).collect()
    }

    fn text<'a>(span: &'a Value, name: &str) -> &'a str {
        span[name].as_str().unwrap_or_else(|| panic!("{name} in {span}"))
    }

    fn time(span: &Value, name: &str) -> u64 {
        text(span, name).parse().unwrap()
    }

    /// Sends one request and ends the program, which flushes its spans.
    async fn traced(
        prefill: &str,
        decode: &str,
        headers: &[(&str, &str)],
        args: &[&str],
    ) -> (Vec<Value>, Vec<String>) {
        let collector = collector().await;
        let url = collector.url();
        let args = [&["--otlp-traces-endpoint", &url], args].concat();
        let program = RouterProcess::start(prefill, decode, &args).await;
        let mut client = program.client().await;
        client.send_request("POST", "/v1/completions", headers, BODY).await;
        client.response().await;
        let lines = program.stop().await;
        (spans(&collector), lines)
    }

    #[tokio::test]
    async fn request_and_legs_have_spans_and_legs_propagate_theirs() {
        let (prefill, decode) = (ok_server().await, ok_server().await);
        let given = format!("00-{TRACE}-{PARENT}-01");
        let headers = [("traceparent", given.as_str()), ("tracestate", "v=1"), ("x-request-id", "r-1")];
        let (spans, _) = traced(&prefill.url(), &decode.url(), &headers, &[]).await;
        assert_eq!(spans.len(), 3, "{spans:?}");
        let [request, legs @ ..] = &spans[..] else { unreachable!() };
        assert_eq!((text(request, "traceId"), text(request, "parentSpanId")), (TRACE, PARENT));
        assert_eq!((text(request, "name"), &request["kind"]), ("POST /v1/completions", &2.into()));
        assert_eq!(text(request, "traceState"), "v=1");
        assert!(request["status"].is_null(), "{request}");
        let known = attributes(request);
        for (name, value) in [
            ("http.request.method", "POST"),
            ("http.response.status_code", "200"),
            ("mini_lb.request_id", "r-1"),
            ("mini_lb.attempts", "1"),
            ("mini_lb.streaming", "false"),
            ("http.response.body.size", "2"),
        ] {
            assert_eq!(known[name], value, "{name}");
        }
        for (leg, server, role) in [(&legs[0], &prefill, "prefill"), (&legs[1], &decode, "decode")] {
            assert_eq!((text(leg, "traceId"), text(leg, "parentSpanId")), (TRACE, text(request, "spanId")));
            assert_eq!((text(leg, "name"), &leg["kind"]), (role, &3.into()));
            assert_eq!(attributes(leg)["server.address"], server.url());
            let notified = format!("00-{TRACE}-{}-01", text(leg, "spanId"));
            let seen = server.only_request().await;
            assert_eq!(seen.head.header("traceparent"), Some(notified.as_str()));
            assert_eq!(seen.head.header("tracestate"), Some("v=1"));
            assert!(time(request, "startTimeUnixNano") <= time(leg, "startTimeUnixNano"));
            assert!(time(leg, "startTimeUnixNano") <= time(leg, "endTimeUnixNano"));
            assert!(time(leg, "endTimeUnixNano") <= time(request, "endTimeUnixNano"));
        }
        assert_ne!(text(&legs[0], "spanId"), text(&legs[1], "spanId"));
        fn moments(leg: &Value) -> Vec<&str> {
            let events = leg["events"].as_array().unwrap();
            assert!(events.iter().all(|event| {
                let at = time(event, "timeUnixNano");
                time(leg, "startTimeUnixNano") <= at && at <= time(leg, "endTimeUnixNano")
            }));
            events.iter().map(|event| text(event, "name")).collect()
        }
        assert_eq!(moments(&legs[1]), ["request written", "answer head", "first byte"]);
        // Prefill's response may or may not arrive before the end.
        assert!(["request written", "answer head"].starts_with(&moments(&legs[0])), "{}", legs[0]);
    }

    #[tokio::test]
    async fn missing_or_invalid_traceparent_starts_a_trace() {
        for headers in [&[][..], &[("traceparent", "00-0-0-01"), ("tracestate", "v=1")]] {
            let (prefill, decode) = (ok_server().await, ok_server().await);
            let (spans, _) = traced(&prefill.url(), &decode.url(), headers, &[]).await;
            assert!(spans[0]["parentSpanId"].is_null() && spans[0]["traceState"].is_null(), "{}", spans[0]);
            let notified = format!("00-{}-{}-01", text(&spans[0], "traceId"), text(&spans[2], "spanId"));
            let seen = decode.only_request().await;
            assert_eq!(seen.head.header("traceparent"), Some(notified.as_str()));
            assert_eq!(seen.head.header("tracestate"), None);
        }
    }

    #[tokio::test]
    async fn unsampled_request_has_no_spans() {
        let (prefill, decode) = (ok_server().await, ok_server().await);
        let given = format!("00-{TRACE}-{PARENT}-00");
        let headers = [("traceparent", given.as_str())];
        let (spans, _) = traced(&prefill.url(), &decode.url(), &headers, &[]).await;
        assert_eq!(spans, [Value::Null; 0]);
        assert_eq!(decode.only_request().await.head.header("traceparent"), Some(given.as_str()));
    }

    #[tokio::test]
    async fn failure_marks_the_spans_it_belongs_to() {
        let prefill = ScriptedServer::start(|_| vec![Step::Hang]).await;
        let decode = ScriptedServer::start(|_| vec![Step::Close]).await;
        let (spans, _) = traced(&prefill.url(), &decode.url(), &[], &["--disable-retries"]).await;
        let of = |span: &Value| (span["status"]["code"].clone(), attributes(span).remove("error.type"));
        let code = Some("decode_closed".to_owned());
        assert_eq!(of(&spans[0]), (2.into(), code.clone()));
        assert_eq!(of(&spans[1]), (Value::Null, None));
        assert_eq!(of(&spans[2]), (2.into(), code));
        assert_eq!(attributes(&spans[0])["http.response.status_code"], "502");
    }

    #[tokio::test]
    async fn retried_request_has_a_span_per_leg_and_attempt() {
        let prefill = ok_server().await;
        let gone = { ok_server().await.url() };
        let (spans, _) = traced(&prefill.url(), &gone, &[], &[]).await;
        assert_eq!(spans.len(), 5, "{spans:?}");
        let ends: Vec<_> = spans[1..].iter().map(|leg| attributes(leg).remove("error.type")).collect();
        assert_eq!(ends[..2], [Some("sent_again".to_owned()), Some("sent_again".to_owned())]);
        assert_eq!(ends[3].as_deref(), Some("decode_connect"));
    }

    #[tokio::test]
    async fn unreachable_collector_only_drops_spans() {
        let (prefill, decode) = (ok_server().await, ok_server().await);
        let gone = { ok_server().await.url() };
        let program = RouterProcess::between(&prefill, &decode, &["--otlp-traces-endpoint", &gone]).await;
        let mut client = program.client().await;
        client.send_request("POST", "/generate", &[], BODY).await;
        assert_eq!(client.response().await.status(), 200);
        let line = program.line("spans were dropped").await;
        assert!(line.contains("WARN ") && line.contains("requests=1"), "{line}");
    }

    #[tokio::test]
    async fn invalid_collector_url_is_rejected_by_name() {
        let args = ["--otlp-traces-endpoint", "https://c:4318"];
        let mut program = RouterProcess::spawn("http://a:1", "http://b:1", &args);
        assert_eq!(program.exit_code().await, Some(2));
        let lines = program.lines();
        assert!(lines[0].starts_with("error: --otlp-traces-endpoint https://c:4318: "), "{lines:?}");
    }
}
