//! Who may ask over the network: whoever has a token.

use std::{sync::Arc, time::Duration};

use axum::{
    Extension,
    extract::{Request, State},
    http::{
        HeaderMap, HeaderValue,
        header::{AUTHORIZATION, CONNECTION, WWW_AUTHENTICATE},
    },
    middleware::Next,
    response::{IntoResponse, Response},
};
use purlin_api::{Reason, server::Refusal};
use tokio::time::sleep;

use super::peer::{Peer, Peers};
use crate::tokens::Tokens;

/// How long the answer to a wrong token takes. It keeps nobody waiting who has a right one.
const PENALTY: Duration = Duration::from_secs(1);

/// What decides.
#[derive(Clone)]
pub struct Gate {
    /// The tokens that there are.
    pub tokens: Arc<Tokens>,
    /// Those who may have shown one.
    pub peers: Arc<Peers>,
}

/// Lets a request through, or refuses it.
pub async fn authorize(
    State(gate): State<Gate>,
    Extension(peer): Extension<Arc<Peer>>,
    request: Request,
    next: Next,
) -> Response {
    let refused = match bearer(request.headers()) {
        Err(message) => unauthorized(message),
        Ok(token) => match gate.tokens.check(token, |hash| gate.peers.admit(&peer, hash)) {
            Some(Ok(())) => return next.run(request).await,
            Some(Err(_)) => {
                Refusal::new(Reason::Unavailable, "there are too many connections: try again later").into_response()
            }
            None => {
                sleep(PENALTY).await;
                unauthorized("nobody has this token: 'purlin token create' makes one, on the daemon's host")
            }
        },
    };
    // The next attempt is another connection's.
    ([(CONNECTION, HeaderValue::from_static("close"))], refused).into_response()
}

/// The token that a request shows (RFC 6750, 2.1).
fn bearer(headers: &HeaderMap) -> Result<&[u8], &'static str> {
    let mut shown = headers.get_all(AUTHORIZATION).iter();
    let shown = match (shown.next(), shown.next()) {
        (Some(shown), None) => shown.as_bytes(),
        (None, _) => return Err("it takes a token: send 'Authorization: Bearer TOKEN'"),
        (Some(_), Some(_)) => return Err("there are two authorizations: one is enough"),
    };
    match shown.split_at_checked(SCHEME.len()) {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case(SCHEME) => Ok(token.trim_ascii_start()),
        _ => Err("this is no bearer token: send 'Authorization: Bearer TOKEN'"),
    }
}

/// What is before the token.
const SCHEME: &[u8] = b"Bearer ";

fn unauthorized(message: &str) -> Response {
    let challenge = [(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"))];
    let refusal = Refusal::new(Reason::Unauthorized, message).into_response();
    (challenge, refusal).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bearer_token() {
        let with = |values: &[&'static [u8]]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(AUTHORIZATION, HeaderValue::from_bytes(value).unwrap());
            }
            bearer(&headers).map(<[u8]>::to_vec).ok()
        };
        assert_eq!(with(&[b"Bearer abc"]), Some(b"abc".to_vec()));
        assert_eq!(with(&[b"bearer  abc"]), Some(b"abc".to_vec()));
        let wrong: [&[&[u8]]; 7] = [
            &[],
            &[b""],
            &[b"Bearer"],
            &[b"abc"],
            &[b"Basic YTpi"],
            &[b"Bear\xffr abc"],
            &[b"Bearer abc", b"Bearer abc"],
        ];
        for wrong in wrong {
            assert_eq!(with(wrong), None, "{wrong:?}");
        }
    }
}
