//! The state machine of pods, in every order of events, and the cost of large lists.
//!
//! The invariant: after each event the servers are exactly the pods that the API server has
//! now, that match a selector, are ready, are not terminating, have not ended and have a
//! valid address and annotation; of several with one address the newest.

use std::collections::BTreeSet;
use std::time::Instant;

use serde_json::{Value, json};

use super::*;
use crate::upstream::PodLabels;

const POD: &str = include_str!("../../../../tests/fixtures/kubernetes/pod.json");
const PENDING: &str = include_str!("../../../../tests/fixtures/kubernetes/pending.json");

fn source() -> PodSource {
    let labels = |role: &str| -> PodLabels {
        [("app.kubernetes.io/name", "sglang"), ("sglang/role", role)]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into()
    };
    PodSource {
        namespace: None,
        port: 30_000,
        selectors: vec![(Role::Prefill, labels("prefill")), (Role::Decode, labels("decode"))],
    }
}

fn parsed(pod: &Value) -> Pod {
    serde_json::from_value(pod.clone()).unwrap()
}

/// What the servers are, for comparisons.
fn shown(servers: &[ServerSpec]) -> BTreeSet<(&'static str, String)> {
    servers.iter().map(|spec| (spec.role().as_str(), format!("{spec:?}"))).collect()
}

fn urls(pods: &mut Pods) -> Vec<String> {
    let url = |spec: &ServerSpec| {
        let text = format!("{spec:?}");
        let url = text.split("url: \"").nth(1).unwrap().split('"').next().unwrap();
        format!("{} {url}", spec.role())
    };
    pods.servers().iter().map(url).collect()
}

/// The states that a pod may be in for the API server.
#[derive(Debug, Clone, Copy, PartialEq)]
enum State {
    Ready,
    NotReady,
    Terminating,
    Failed,
    Decode,
    /// Its labels are not asked for any more, so the API server says that it is deleted.
    OtherLabels,
    BadPort,
    Gone,
    /// Another pod of the same name.
    Successor,
}

const STATES: [State; 9] = [
    State::Ready,
    State::NotReady,
    State::Terminating,
    State::Failed,
    State::Decode,
    State::OtherLabels,
    State::BadPort,
    State::Gone,
    State::Successor,
];

fn pod(name: &str, address: &str, state: State) -> Value {
    let mut pod: Value = serde_json::from_str(POD).unwrap();
    let created = format!("2026-03-02T09:14:0{}Z", if name == "a" { 1 } else { 2 });
    let uid = if state == State::Successor { format!("{name}-2") } else { format!("{name}-1") };
    // A pod that has ended may be called ready for a moment.
    let ready = if state == State::NotReady { "False" } else { "True" };
    pod["metadata"]["name"] = json!(name);
    pod["metadata"]["uid"] = json!(uid);
    pod["metadata"]["creationTimestamp"] = json!(created);
    pod["status"]["podIP"] = json!(address);
    pod["status"]["conditions"][2]["status"] = json!(ready);
    match state {
        State::Terminating => pod["metadata"]["deletionTimestamp"] = json!("2026-03-02T10:00:00Z"),
        State::Failed => pod["status"]["phase"] = json!("Failed"),
        State::Decode => pod["metadata"]["labels"]["sglang/role"] = json!("decode"),
        State::OtherLabels => pod["metadata"]["labels"]["sglang/role"] = json!("none"),
        State::BadPort => pod["metadata"]["annotations"]["sglang.ai/bootstrap-port"] = json!("89a"),
        _ => {}
    }
    pod
}

/// The role that a pod in this state serves in.
fn serves(state: State) -> Option<Role> {
    match state {
        State::Ready | State::Successor => Some(Role::Prefill),
        State::Decode => Some(Role::Decode),
        _ => None,
    }
}

/// The servers of two pods in these states, by the invariant alone.
fn expected(names: &[(&str, &str); 2], states: [Option<State>; 2]) -> BTreeSet<(&'static str, String)> {
    let serving = |place: usize| Some((states[place].and_then(serves)?, names[place].1));
    let mut servers: Vec<(Role, &str)> = (0..2).filter_map(serving).collect();
    // The second pod is the newer one.
    if let [(_, first), (_, second)] = servers[..]
        && first == second
    {
        servers.remove(0);
    }
    let spec = |(role, address): (Role, &str)| {
        let address = crate::upstream::Address::parse(&format!("http://{address}:30000")).unwrap();
        ServerSpec::new(role, address, (role == Role::Prefill).then_some(8998))
    };
    shown(&servers.into_iter().map(spec).collect::<Vec<_>>())
}

/// Every sequence of three steps, of which each puts one of two pods into a state, told by an event or list.
#[test]
fn servers_are_the_ready_pods_after_every_order_of_events() {
    let mut checked = 0;
    for names in [[("a", "10.0.0.1"), ("b", "10.0.0.2")], [("a", "10.0.0.1"), ("b", "10.0.0.1")]] {
        let steps: Vec<(usize, State, bool)> = (0..2)
            .flat_map(|place| STATES.map(|state| [(place, state, false), (place, state, true)]))
            .flatten()
            .collect();
        for first in &steps {
            for second in &steps {
                for third in &steps {
                    let (mut pods, mut states) = (Pods::new(source()), [None, None]);
                    for (place, state, lists) in [first, second, third] {
                        step(&mut pods, &names, &mut states, (*place, *state), *lists);
                        assert_eq!(
                            shown(&pods.servers()),
                            expected(&names, states),
                            "{first:?} {second:?} {third:?} {names:?}"
                        );
                        checked += 1;
                    }
                }
            }
        }
    }
    assert_eq!(checked, 2 * 36 * 36 * 36 * 3);
}

/// Puts a pod into a state, as the API server would tell it.
fn step(
    pods: &mut Pods,
    names: &[(&str, &str); 2],
    states: &mut [Option<State>; 2],
    (place, state): (usize, State),
    lists: bool,
) {
    thread_local! {
        /// Parsing the text of a pod is all that takes time here.
        static PARSED: std::cell::RefCell<HashMap<String, Pod>> = std::cell::RefCell::default();
    }
    let pod_of = |place: usize, state: State| {
        let (name, address) = names[place];
        let key = format!("{name} {address} {state:?}");
        let made = || parsed(&pod(name, address, state));
        PARSED.with_borrow_mut(|parsed| parsed.entry(key).or_insert_with(made).clone())
    };
    let is_listed = |state: &State| !matches!(state, State::Gone | State::OtherLabels);
    let before = states[place];
    states[place] = Some(state);
    if lists {
        let all = (0..2).filter_map(|place| Some((place, states[place].filter(is_listed)?)));
        pods.replace(all.map(|(place, state)| pod_of(place, state)).collect());
        return;
    }
    let is_successor = |state: Option<State>| state == Some(State::Successor);
    // A name is free again only when its pod has been deleted.
    if before.is_some_and(|before| is_listed(&before)) && is_successor(before) != is_successor(Some(state)) {
        pods.delete(&pod_of(place, before.expect("it was listed")));
    }
    match state {
        State::Gone | State::OtherLabels => pods.delete(&pod_of(place, before.unwrap_or(state))),
        _ => pods.apply(&pod_of(place, state)),
    }
}

#[test]
fn a_pod_of_the_api_server_is_read() {
    let mut pods = Pods::new(source());
    pods.replace(vec![serde_json::from_str(POD).unwrap(), serde_json::from_str(PENDING).unwrap()]);
    assert_eq!(urls(&mut pods), ["prefill http://10.244.3.17:30000"]);
    assert_eq!(
        expected(&[("a", "10.244.3.17"), ("b", "")], [Some(State::Ready), None]),
        shown(&pods.servers())
    );
    // What may be missing.
    let bare = json!({"metadata": {"name": "a", "labels": null, "annotations": null}, "status": null});
    pods.replace(vec![parsed(&bare)]);
    assert!(urls(&mut pods).is_empty());
}

#[test]
fn addresses_of_ipv6_are_in_brackets() {
    let mut pods = Pods::new(source());
    pods.apply(&parsed(&pod("a", "fd00:10:244::1f", State::Decode)));
    assert_eq!(urls(&mut pods), ["decode http://[fd00:10:244::1f]:30000"]);
}

#[test]
fn what_is_no_address_or_port_is_refused_and_counted() {
    let mut pods = Pods::new(source());
    for (place, address) in ["10.0.0", "fe80::1%eth0", "example.com", "10.0.0.1:80"].iter().enumerate() {
        pods.apply(&parsed(&pod("a", address, State::Ready)));
        assert_eq!((urls(&mut pods).len(), pods.refused()), (0, 1), "{place}");
    }
    for port in ["", "0", "65536", "+8998", "8998 ", "none"] {
        let mut wrong = pod("a", "10.0.0.1", State::Ready);
        wrong["metadata"]["annotations"]["sglang.ai/bootstrap-port"] = json!(port);
        pods.apply(&parsed(&wrong));
        assert_eq!((urls(&mut pods).len(), pods.refused()), (0, 1), "{port}");
        // It is of no use to a decode server.
        wrong["metadata"]["labels"]["sglang/role"] = json!("decode");
        pods.apply(&parsed(&wrong));
        assert_eq!((urls(&mut pods).len(), pods.refused()), (1, 0), "{port}");
    }
    let mut without = pod("a", "10.0.0.1", State::Ready);
    without["metadata"]["annotations"] = Value::Null;
    pods.apply(&parsed(&without));
    assert_eq!(urls(&mut pods), ["prefill http://10.0.0.1:30000"]);
}

#[test]
fn a_late_end_of_a_pod_does_not_remove_its_successor() {
    let mut pods = Pods::new(source());
    pods.apply(&parsed(&pod("a", "10.0.0.1", State::Ready)));
    pods.apply(&parsed(&pod("a", "10.0.0.2", State::Successor)));
    pods.delete(&parsed(&pod("a", "10.0.0.1", State::Terminating)));
    assert_eq!(urls(&mut pods), ["prefill http://10.0.0.2:30000"]);
}

fn many(count: u32) -> Vec<Pod> {
    let template = parsed(&pod("a", "10.0.0.1", State::Ready));
    let one = |number: u32| {
        let mut pod = template.clone();
        pod.metadata.name = format!("sglang-{number:05}");
        pod.set_address(std::net::Ipv4Addr::from(0x0a00_0000 + number));
        pod
    };
    (1..=count).map(one).collect()
}

#[test]
fn servers_beyond_the_limit_are_the_newest_and_the_others_stay() {
    let mut pods = Pods::new(source());
    let mut all = many(1_100);
    for (number, pod) in all.iter_mut().enumerate() {
        pod.metadata.creation_timestamp = Some(format!("2026-03-02T09:{:02}:00Z", 59 - number / 20));
    }
    pods.replace(all.clone());
    let servers = urls(&mut pods);
    assert_eq!(servers.len(), MAX_SERVERS_PER_ROLE);
    // The last of the list is the oldest.
    assert!(servers.iter().any(|url| url == "prefill http://10.0.4.76:30000"), "{:?}", &servers[..3]);
    assert!(pods.has_excess);
    pods.replace(all.split_off(600));
    assert_eq!((urls(&mut pods).len(), pods.has_excess), (500, false));
}

/// Not exact, as the machine may be busy: a quadratic cost would be seconds.
#[test]
fn five_thousand_pods_cost_milliseconds() {
    let (mut pods, list) = (Pods::new(source()), many(5_000));
    let event = list[2_500].clone();
    let began = Instant::now();
    pods.replace(list);
    let listed = pods.servers().len();
    let of_list = began.elapsed();
    let began = Instant::now();
    pods.apply(&event);
    let after = pods.servers().len();
    let of_event = began.elapsed();
    println!("5,000 pods: the list {of_list:?}, one event {of_event:?}");
    assert_eq!((listed, after), (MAX_SERVERS_PER_ROLE, MAX_SERVERS_PER_ROLE));
    assert!(of_list.as_millis() < 2_000 && of_event.as_millis() < 1_000, "{of_list:?} {of_event:?}");
}
