//! The status page: one file, without data, that asks [`super::activity`] for them.
//!
//! **Invariant:** a browser that keeps to the headers runs no script and asks no server but what is in the file and this
//! daemon, whatever a name or an error says.

use std::fmt::Write as _;
use std::sync::LazyLock;

use axum::extract::Request;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HOST, REFERRER_POLICY,
    X_CONTENT_TYPE_OPTIONS,
};
use axum::http::uri::Authority;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::digest::{SHA256, digest};

use super::access::Peer;
use super::{ApiError, Kind};

const PAGE: &str = include_str!("status_page.html");

/// What the page may do: what is between its tags, known by their digests, and calls to where it came from.
static POLICY: LazyLock<String> = LazyLock::new(|| {
    let mut policy =
        "default-src 'none'; connect-src 'self'; base-uri 'none'; form-action 'none'; \
                      frame-ancestors 'none'"
            .to_owned();
    for tag in ["script", "style"] {
        let digest = STANDARD.encode(digest(&SHA256, between(tag).as_bytes()));
        // Writing to a string does not fail.
        let _ = write!(policy, "; {tag}-src 'sha256-{digest}'");
    }
    policy
});

/// What is between the page's only tags of this name.
fn between(tag: &str) -> &'static str {
    let inner = PAGE.split_once(&format!("<{tag}>"));
    let inner = inner.and_then(|(_, rest)| rest.split_once(&format!("</{tag}>")));
    inner.map_or("", |(inner, _)| inner)
}

pub(super) async fn page() -> impl IntoResponse {
    let headers = [
        (CONTENT_TYPE, "text/html; charset=utf-8"),
        (CONTENT_SECURITY_POLICY, POLICY.as_str()),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        (CACHE_CONTROL, "no-store"),
    ];
    (headers, PAGE)
}

/// Lets requests of this host through, by a name that is this host's: a page of another site, whose name leads here,
/// is not.
pub(super) async fn this_host_only(request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    let near = matches!(Peer::of_request(&parts), Peer::Tcp(from) if from.ip().to_canonical().is_loopback());
    let host = parts.headers.get(HOST).and_then(|host| host.to_str().ok());
    if near && host.is_some_and(is_this_host) {
        return next.run(Request::from_parts(parts, body)).await;
    }
    let message = "this is for the daemon's own host, where no token is asked for";
    let remedy = "look from there by http://127.0.0.1, or with a token at access.listen";
    ApiError::new(Kind::Denied, message, remedy).into_response()
}

fn is_this_host(host: &str) -> bool {
    let Ok(authority) = host.parse::<Authority>() else {
        return false;
    };
    let host = authority.host().trim_matches(['[', ']']);
    let is_loopback = |ip: std::net::IpAddr| ip.to_canonical().is_loopback();
    host.eq_ignore_ascii_case("localhost") || host.parse().is_ok_and(is_loopback)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_asks_nobody_else_and_writes_no_markup() {
        for tag in ["script", "style"] {
            assert_eq!(PAGE.matches(&format!("<{tag}")).count(), 1);
            assert!(between(tag).len() > 1000);
            assert!(POLICY.contains(&format!("{tag}-src 'sha256-")));
        }
        for never in [
            "innerHTML",
            "outerHTML",
            "insertAdjacent",
            "document.write",
            "eval(",
            "localStorage",
            " style=",
            " onclick",
            "src=",
            "href=",
            "@import",
            "url(",
        ] {
            assert!(!PAGE.contains(never), "{never}");
        }
        let elsewhere = PAGE.replace("http://www.w3.org/2000/svg", "");
        assert!(!elsewhere.contains("://"));
    }

    #[test]
    fn this_host_goes_by_its_own_names_only() {
        for host in [
            "localhost",
            "LOCALHOST:90",
            "127.0.0.1:9100",
            "127.8.0.1",
            "[::1]:9100",
        ] {
            assert!(is_this_host(host), "{host}");
        }
        for host in [
            "",
            "evil.example:9100",
            "127.0.0.1.evil.example",
            "10.0.0.1",
            "localhost.evil",
        ] {
            assert!(!is_this_host(host), "{host}");
        }
    }
}
