//! What prefill servers say of their prompts: it is read off responses that are discarded, counted, and told
//! to the policy.

mod kit;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use kit::{Router, ScriptedServer, Step, fixture, json};
use mini_lb::{Backend, Choice, CompletedPrefill, Policy, Selection};

/// Prompt tokens and cached tokens.
type Tokens = (Option<u64>, Option<u64>);

/// What a policy was told: the tokens, the bytes of the prompt and those believed cached, and its memo.
type Told = (Tokens, u64, u64, u128);

/// A policy of a library user that keeps what it is told.
#[derive(Clone, Default)]
struct Listener(Arc<Mutex<Vec<Told>>>);

const BELIEVED: u64 = 3;
const MEMO: u128 = 7 << 100;

impl Policy for Listener {
    fn pick<'a>(&self, choice: &Choice<'a>) -> &'a Arc<Backend> {
        &choice.servers()[0]
    }

    fn choose<'a>(&self, choice: &Choice<'a>) -> Selection<'a> {
        Selection::new(self.pick(choice)).with_cached(BELIEVED).with_memo(MEMO)
    }

    fn prefill_completed(&self, completed: &CompletedPrefill<'_>) {
        assert!(
            completed.time().is_some_and(|time| time > Duration::ZERO && time < Duration::from_secs(600))
        );
        assert_eq!(completed.work_before(), 0);
        let tokens = (completed.prompt_tokens(), completed.cached_tokens());
        let told = (tokens, completed.prompt_bytes(), completed.believed_cached_bytes(), completed.memo());
        self.0.lock().unwrap().push(told);
    }
}

impl Listener {
    /// Waits until it has been told of as many legs.
    async fn wait(&self, legs: usize) -> Vec<Told> {
        kit::with_timeout("the end of prefill's leg", async {
            while self.0.lock().unwrap().len() < legs {
                tokio::task::yield_now().await;
            }
        })
        .await;
        self.0.lock().unwrap().clone()
    }
}

async fn router(prefill: &ScriptedServer, decode: &ScriptedServer) -> (Router, Listener) {
    let listener = Listener::default();
    let policy = listener.clone();
    let router = Router::start_with(&[prefill], &[decode], |config| {
        config.prefill_policy(policy).decode_policy(mini_lb::Random)
    })
    .await;
    (router, listener)
}

/// Recordings of servers without `--enable-cache-report`.
const RECORDED: [(&str, Tokens); 11] = [
    ("gen_basic", (Some(4), Some(0))),
    ("gen_stream", (Some(4), Some(3))),
    ("gen_port_null", (Some(4), Some(3))),
    // Merged.
    ("gen_logprob", (Some(4), Some(0))),
    ("gen_logprob_stream", (Some(4), Some(0))),
    ("gen_batch_lists", (None, None)),
    ("gen_batch_lists_stream", (None, None)),
    ("chat_basic", (Some(7), None)),
    ("chat_stream", (Some(7), None)),
    ("cmpl_basic", (Some(3), None)),
    ("cmpl_stream", (None, None)),
];

#[tokio::test]
async fn a_policy_is_told_what_recorded_responses_of_prefill_say() {
    for (name, expected) in RECORDED {
        let part = |what: &str| fixture(&format!("pd/{name}.{what}")).expect("a recording");
        let request = part("decode.req");
        let prefill = ScriptedServer::always(part("prefill.resp").raw).await;
        let decode = ScriptedServer::always(part("decode.resp").raw).await;
        let (router, listener) = router(&prefill, &decode).await;
        let path = request.head.start_line.split(' ').nth(1).expect("a target").to_owned();
        let body = String::from_utf8(request.body).expect("UTF-8");
        assert_eq!(router.client().await.post(&path, &body).await.status(), 200, "{name}");
        let told = listener.wait(1).await;
        assert_eq!(told, [(expected, body.len() as u64, BELIEVED, MEMO)], "{name}");
        let server = router.backend(&prefill);
        let counted = (server.told_prompt_tokens(), server.told_cached_tokens());
        assert_eq!(counted, (expected.0.unwrap_or(0), expected.1.unwrap_or(0)), "{name}");
        assert_eq!(server.told_prompt_bytes(), expected.0.map_or(0, |_| body.len() as u64), "{name}");
        assert_eq!(router.backend(&decode).told_prompt_tokens(), 0, "{name}");
    }
}

#[tokio::test]
async fn numbers_are_found_wherever_the_response_is_cut_into_writes() {
    let whole = fixture("pd/gen_stream.prefill.resp").expect("a recording").raw;
    let name = whole.windows(15).position(|window| window == b"\"prompt_tokens\"").expect("its name");
    let at = Arc::new(Mutex::new(name));
    let (response, cut) = (whole.clone(), Arc::clone(&at));
    let prefill = ScriptedServer::start(move |_| {
        let (first, second) = response.split_at(*cut.lock().unwrap());
        // A reader that is quick gets two pieces, a slow one the whole.
        let pause = Step::Pause(Duration::from_millis(2));
        vec![Step::Send(first.to_vec()), pause, Step::Send(second.to_vec())]
    })
    .await;
    let decode = ScriptedServer::always(fixture("pd/gen_stream.decode.resp").expect("a recording").raw).await;
    let (router, listener) = router(&prefill, &decode).await;
    let mut client = router.client().await;
    for cut in 0..24 {
        *at.lock().unwrap() = name + cut;
        assert_eq!(client.post("/generate", r#"{"text":"a","stream":true}"#).await.status(), 200);
        let told = listener.wait(cut + 1).await;
        assert_eq!(told[cut].0, (Some(4), Some(3)), "cut {cut} bytes into the name");
    }
}

#[tokio::test]
async fn nothing_is_told_of_a_leg_that_failed() {
    let body = r#"{"meta_info":{"prompt_tokens":4,"cached_tokens":3}}"#;
    let cut_off = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len() + 1);
    for response in [json("400 Bad Request", body), json("500 Internal Server Error", body), cut_off.into()] {
        let prefill = ScriptedServer::start(move |_| vec![Step::Send(response.clone()), Step::Close]).await;
        let decode = ScriptedServer::start(|_| vec![Step::Hang]).await;
        let (router, listener) = router(&prefill, &decode).await;
        let status = router.client().await.post("/generate", r#"{"text":"a"}"#).await.status();
        assert_ne!(status, 200);
        router.wait_idle().await;
        assert!(listener.0.lock().unwrap().is_empty(), "{status}");
        assert_eq!(router.backend(&prefill).told_prompt_tokens(), 0);
    }
}

#[tokio::test]
async fn numbers_that_cannot_be_true_are_not_believed() {
    for usage in [r#""prompt_tokens":4,"cached_tokens":5"#, r#""prompt_tokens":999999999,"cached_tokens":0"#]
    {
        let prefill =
            ScriptedServer::always(json("200 OK", &format!(r#"{{"meta_info":{{{usage}}}}}"#))).await;
        let decode = ScriptedServer::always(json("200 OK", "{}")).await;
        let (router, listener) = router(&prefill, &decode).await;
        assert_eq!(router.client().await.post("/generate", r#"{"text":"a"}"#).await.status(), 200);
        assert_eq!(listener.wait(1).await[0].0, (None, None), "{usage}");
        assert_eq!(router.backend(&prefill).told_cached_tokens(), 0);
    }
}

#[tokio::test]
async fn a_server_that_reports_cached_tokens_means_0_when_it_leaves_them_out() {
    let answer = |details: &str| {
        json("200 OK", &format!(r#"{{"usage":{{"prompt_tokens":9,"prompt_tokens_details":{details}}}}}"#))
    };
    let details = Arc::new(Mutex::new(vec!["null", r#"{"cached_tokens":8}"#, "null"]));
    let prefill =
        ScriptedServer::start(move |_| vec![Step::Send(answer(details.lock().unwrap().pop().unwrap()))])
            .await;
    let decode = ScriptedServer::always(json("200 OK", "{}")).await;
    let (router, listener) = router(&prefill, &decode).await;
    let mut client = router.client().await;
    for request in 1..=3 {
        assert_eq!(client.post("/v1/completions", r#"{"prompt":"a"}"#).await.status(), 200);
        listener.wait(request).await;
    }
    let cached: Vec<_> = listener.wait(3).await.iter().map(|told| told.0.1).collect();
    assert_eq!(cached, [None, Some(8), Some(0)]);
}
