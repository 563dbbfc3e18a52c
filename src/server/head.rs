//! What must be refused in a request's head although hyper takes it (RFC 9112).
//!
//! A head that two programs could read in two ways is never guessed at. hyper
//! itself refuses what its parser does not take, with an answer without a body.

use hyper::header::{HOST, HeaderMap, HeaderValue, TRANSFER_ENCODING};
use hyper::{Request, Uri, Version};

/// Headers of a request. hyper has the same bound over HTTP/1.1 and none over HTTP/2.
const MAX_HEADERS: usize = 100;

/// Says what is wrong with a head, if anything is.
pub(super) fn check<B>(request: &Request<B>) -> Result<(), &'static str> {
    if request.headers().len() > MAX_HEADERS {
        return Err("there are more than 100 headers");
    }
    check_host(request)?;
    check_coding(request.headers())?;
    check_target(request.uri())
}

/// RFC 9112 3.2: one `Host` in HTTP/1.1, one or none in HTTP/1.0. RFC 9113 8.3.1: `:authority` takes its place in HTTP/2,
/// or says the same.
fn check_host<B>(request: &Request<B>) -> Result<(), &'static str> {
    let version = request.version();
    let authority = request.uri().authority().filter(|_| version == Version::HTTP_2);
    let mut hosts = request.headers().get_all(HOST).iter();
    match (hosts.next(), hosts.next()) {
        (None, _) if version == Version::HTTP_10 || authority.is_some() => Ok(()),
        (None, _) => Err("there is no Host header"),
        (Some(_), Some(_)) => Err("there is more than one Host header"),
        (Some(host), None) if is_host(host) => match authority {
            Some(authority) if !host.as_bytes().eq_ignore_ascii_case(authority.as_str().as_bytes()) => {
                Err("the Host header and :authority differ")
            }
            _ => Ok(()),
        },
        (Some(_), None) => Err("the Host header is not a host"),
    }
}

/// Whether all characters may be part of a host and a port (RFC 3986 3.2.2). It may be empty.
fn is_host(value: &HeaderValue) -> bool {
    let may_be_part = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~%!$&'()*+,;=:[]".contains(byte);
    value.as_bytes().iter().all(may_be_part)
}

/// Only `chunked`, once: whoever came before may have understood another coding, or two, in another way.
fn check_coding(headers: &HeaderMap) -> Result<(), &'static str> {
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    match (codings.next(), codings.next()) {
        (None, _) => Ok(()),
        (Some(coding), None) if coding.as_bytes().eq_ignore_ascii_case(b"chunked") => Ok(()),
        _ => Err("the only Transfer-Encoding that is understood is chunked, once"),
    }
}

/// A path, or a whole URL (RFC 9112 3.2.1 and 3.2.2). The other two forms are for proxies and for `OPTIONS`.
fn check_target(target: &Uri) -> Result<(), &'static str> {
    let is_known = match target.scheme_str() {
        None => target.authority().is_none() && target.path().starts_with('/'),
        Some(scheme) => ["http", "https"].contains(&scheme),
    };
    if is_known { Ok(()) } else { Err("the request target is not a path") }
}
