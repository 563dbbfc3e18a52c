//! A prefill server's bootstrap port: a small HTTP server as in SGLang, with one more route that upgrades to
//! a rendezvous connection. What legs do after they have met is decided elsewhere.

use std::{collections::HashMap, convert::Infallible, sync::Arc};

use bytes::{Bytes, BytesMut};
use http_body_util::Full;
use hyper::{Request, Response, body::Incoming, header, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpStream,
    sync::{mpsc, watch},
};

use super::{Frame, Op, PROTOCOL, QUEUE, ROUTE, rooms::Partner};
use crate::sim::{config::LoadBalance, state::State};

/// Serves one connection to the bootstrap port.
pub(crate) async fn connection(stream: TcpStream, state: Arc<State>) {
    let service = service_fn(|request| {
        let state = Arc::clone(&state);
        async move { Ok::<_, Infallible>(respond(request, &state)) }
    });
    // Errors are the client's and end its connection.
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).with_upgrades().await;
}

fn respond(request: Request<Incoming>, state: &Arc<State>) -> Response<Full<Bytes>> {
    match request.uri().path() {
        "/health" => plain(200, "text/plain; charset=utf-8", "OK".to_owned()),
        "/route" => plain(200, "application/json; charset=utf-8", route(state)),
        ROUTE if request.headers().get(header::UPGRADE).is_some_and(|name| name == PROTOCOL) => {
            let state = Arc::clone(state);
            state.clone().spawn(async move {
                if let Ok(upgraded) = hyper::upgrade::on(request).await {
                    rendezvous(TokioIo::new(upgraded), &state).await;
                }
            });
            upgrade()
        }
        _ => plain(404, "text/plain; charset=utf-8", "404: Not Found".to_owned()),
    }
}

fn plain(status: u16, kind: &str, body: String) -> Response<Full<Bytes>> {
    let built = Response::builder().status(status).header(header::CONTENT_TYPE, kind).body(Full::from(body));
    built.unwrap_or_default()
}

fn upgrade() -> Response<Full<Bytes>> {
    let builder = Response::builder().status(101).header(header::UPGRADE, PROTOCOL);
    builder.header(header::CONNECTION, "upgrade").body(Full::default()).unwrap_or_default()
}

fn route(state: &State) -> String {
    let (port, dp_size) = (state.port(), state.config.dp_size);
    let follows = state.config.balance() == LoadBalance::FollowBootstrapRoom;
    format!(
        "{{\"attn_tp_size\": 1, \"attn_cp_size\": 1, \"dp_size\": {dp_size}, \"pp_size\": 1, \"page_size\": 1, \
         \"kv_cache_dtype\": \"auto\", \"follow_bootstrap_room\": {follows}, \"enable_dsa_cache_layer_split\": false, \
         \"decode_allocation_policy\": \"early\", \"enable_kv_cache_sharding\": false, \
         \"prefill_http_port\": {port}, \"target_tp_rank\": null, \"target_tp_ranks\": null, \
         \"target_cp_ranks\": null, \"target_pp_ranks\": null, \"required_dst_info_num\": null, \
         \"required_prefill_response_num\": null}}"
    )
}

/// Runs the rendezvous protocol with one decode server until either side disconnects.
async fn rendezvous(mut stream: impl AsyncRead + AsyncWrite + Unpin, state: &State) {
    let (out, mut frames) = mpsc::channel::<Frame>(QUEUE);
    let mut waiting: HashMap<u64, watch::Sender<bool>> = HashMap::new();
    let (mut input, mut output) = (BytesMut::new(), BytesMut::new());
    loop {
        tokio::select! {
            read = stream.read_buf(&mut input) => {
                if !matches!(read, Ok(1..)) || take_frames(&mut input, &mut waiting, &out, state).is_err() {
                    break;
                }
            }
            Some(frame) = frames.recv() => {
                let mut next = Some(frame);
                while let Some(frame) = next {
                    waiting.remove(&frame.leg);
                    frame.write(&mut output);
                    next = frames.try_recv().ok();
                }
                if stream.write_all_buf(&mut output).await.is_err() {
                    break;
                }
            }
        }
    }
    drop(frames);
    state.rooms.forget(|partner| partner.out.same_channel(&out));
}

fn take_frames(
    input: &mut BytesMut,
    waiting: &mut HashMap<u64, watch::Sender<bool>>,
    out: &mpsc::Sender<Frame>,
    state: &State,
) -> Result<(), u8> {
    while let Some(frame) = Frame::read(input)? {
        match frame.op {
            Op::Claim => {
                let (gone, abandoned) = watch::channel(false);
                waiting.insert(frame.leg, gone);
                state.rooms.claim(
                    frame.value,
                    Partner { leg: frame.leg, rank: frame.rank, out: out.clone(), abandoned },
                );
            }
            Op::Abandon => {
                if let Some(gone) = waiting.remove(&frame.leg) {
                    gone.send_replace(true);
                    state.rooms.forget(|partner| partner.leg == frame.leg && partner.out.same_channel(out));
                }
            }
            Op::Delivered | Op::Failed => return Err(frame.op as u8),
        }
    }
    Ok(())
}
