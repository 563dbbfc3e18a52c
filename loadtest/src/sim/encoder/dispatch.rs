//! What a language-only prefill server asks of its encoders: each gets a share of a request's media, all at
//! once. With zmq transfer the scheduler also tells where it wants the embeddings.

use std::{io, sync::Arc, time::Duration};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
    time,
};

use super::media::{Media, Modality};
use crate::sim::{state::State, transfer::Failure};

/// Seconds until a request to an encoder fails (SGLANG_ENCODER_HTTP_TIMEOUT).
const ENCODER_TIMEOUT: f64 = 1_800.0;
/// Limit of an encoder's response.
const RESPONSE_LIMIT: u64 = 1 << 20;

/// The media of one modality that one encoder gets.
struct Share {
    encoder: usize,
    modality: Modality,
    items: Vec<String>,
}

/// Has all media of a prompt encoded. Without encoders the real server encodes them itself.
pub(crate) async fn dispatch(state: &Arc<State>, rid: &str, media: &[Media]) -> Result<(), Failure> {
    let mut urls = state.encoding.urls();
    if urls.is_empty() || media.is_empty() {
        return Ok(());
    }
    fastrand::shuffle(&mut urls);
    let shares = shares(media, urls.len());
    let count = shares.len();
    let mut tasks = JoinSet::new();
    for (part, share) in shares.into_iter().enumerate() {
        let (url, host) = (urls[share.encoder].clone(), state.addr);
        let id = format!("{rid}_local_part_{part}");
        let receive = json!({
            "req_id": id, "receive_count": 1, "receive_url": host.to_string(),
            "modality": share.modality.name(),
        });
        let encode = json!({
            "encoder_idx": share.encoder, "encoder_url": url, "mm_items": share.items,
            "num_parts": count, "part_idx": part, "req_id": id, "modality": share.modality.name(),
            "prefill_host": host.ip().to_string(), "embedding_port": null, "time_stats_json": null,
        });
        let timeout = state.config.scaled(ENCODER_TIMEOUT);
        tasks.spawn(async move {
            post(&url, "/scheduler_receive_url", &receive, timeout).await?;
            post(&url, "/encode", &encode, timeout).await
        });
    }
    // The others end with the set.
    while let Some(Ok(done)) = tasks.join_next().await {
        done?;
    }
    Ok(())
}

/// Deals the items of each modality: the same number to each encoder, and one of the rest to some, who are
/// others for the next modality.
fn shares(media: &[Media], encoders: usize) -> Vec<Share> {
    let mut shares = Vec::new();
    let mut first = 0;
    for modality in Modality::ALL {
        let mut items = media.iter().filter(|(own, _)| *own == modality).map(|(_, url)| url.clone());
        let count = items.clone().count();
        let (each, rest) = (count / encoders, count % encoders);
        for encoder in 0..encoders {
            let is_extra = (encoder + encoders - first) % encoders < rest;
            let own: Vec<String> = items.by_ref().take(each + usize::from(is_extra)).collect();
            if !own.is_empty() {
                shares.push(Share { encoder, modality, items: own });
            }
        }
        first = (first + rest) % encoders;
    }
    shares
}

async fn post(url: &str, path: &str, body: &Value, timeout: Duration) -> Result<(), Failure> {
    let failure = |status, message| Failure { status, message };
    match time::timeout(timeout, exchange(url, path, body)).await {
        Ok(Ok((200, _))) => Ok(()),
        Ok(Ok((status, body))) => {
            let said: Value = serde_json::from_slice(&body).unwrap_or_default();
            let message = said.get("message").and_then(Value::as_str).unwrap_or("the encoder failed");
            Err(failure(status, message.to_owned()))
        }
        Ok(Err(error)) => Err(failure(502, format!("Failed to dispatch to encoder {url}: {error}"))),
        Err(_) => Err(failure(504, format!("Encoder {url} did not respond in time"))),
    }
}

/// One request on a connection of its own.
async fn exchange(url: &str, path: &str, body: &Value) -> io::Result<(u16, Vec<u8>)> {
    let authority = url.strip_prefix("http://").unwrap_or(url).trim_end_matches('/');
    let mut stream = TcpStream::connect(authority).await?;
    let body = body.to_string();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: {authority}\r\ncontent-type: application/json\r\nconnection: close\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    let mut response = Vec::new();
    (&mut stream).take(RESPONSE_LIMIT).read_to_end(&mut response).await?;
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut parsed = httparse::Response::new(&mut headers);
    match (parsed.parse(&response), parsed.code) {
        (Ok(httparse::Status::Complete(end)), Some(status)) => Ok((status, response[end..].to_vec())),
        _ => Err(io::Error::other("the response is incomplete")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_are_dealt_evenly_and_the_rest_goes_round() {
        let media: Vec<Media> = [(Modality::Image, 5), (Modality::Video, 1), (Modality::Audio, 2)]
            .into_iter()
            .flat_map(|(modality, count)| (0..count).map(move |item| (modality, item.to_string())))
            .collect();
        let shares = shares(&media, 2);
        let dealt: Vec<_> =
            shares.iter().map(|share| (share.modality, share.encoder, share.items.join(""))).collect();
        let expected = [
            (Modality::Image, 0, "012".to_owned()),
            (Modality::Image, 1, "34".to_owned()),
            (Modality::Video, 1, "0".to_owned()),
            (Modality::Audio, 0, "0".to_owned()),
            (Modality::Audio, 1, "1".to_owned()),
        ];
        assert_eq!(dealt, expected);
    }
}
