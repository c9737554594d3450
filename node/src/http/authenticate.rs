//! On whose behalf is a request? Until accounts are built everybody who reaches the loopback address is this machine's
//! person. A key is not checked, but tells programs apart: each gets its own fair share of the workers.

use axum::extract::Request;
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::Response;
use sha2::{Digest, Sha256};

use ingle_actors::protocol::to_hex;

use crate::ingress::LOCAL_PRINCIPAL;

/// On whose behalf a request is; stands in its extensions.
#[derive(Debug, Clone)]
pub struct Principal(pub String);

/// The middleware.
pub async fn authenticate(mut request: Request, next: Next) -> Response {
    let principal = principal_of(request.headers());
    request.extensions_mut().insert(Principal(principal));
    next.run(request).await
}

/// `local`, with the beginning of the key's hash where there is a key: keys belong into no log.
fn principal_of(headers: &HeaderMap) -> String {
    let bearer = headers.get(header::AUTHORIZATION).map(|value| value.as_bytes());
    let key = bearer
        .and_then(|value| value.split_at_checked(7))
        .filter(|(scheme, key)| scheme.eq_ignore_ascii_case(b"bearer ") && !key.trim_ascii().is_empty());
    match key {
        Some((_, key)) => format!("{LOCAL_PRINCIPAL}:{}", to_hex(&Sha256::digest(key.trim_ascii())[..4])),
        None => LOCAL_PRINCIPAL.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_tell_programs_apart_and_are_not_shown() {
        let of = |value: &str| {
            let headers = HeaderMap::from_iter([(header::AUTHORIZATION, value.parse().unwrap())]);
            principal_of(&headers)
        };
        assert_eq!(principal_of(&HeaderMap::new()), "local");
        assert_eq!(of("Bearer "), "local");
        assert_eq!(of("Basic abc"), "local");
        assert_eq!(of("Bearer one"), of("bearer  one"));
        assert_ne!(of("Bearer one"), of("Bearer two"));
        assert!(of("Bearer one").starts_with("local:") && !of("Bearer one").contains("one"));
    }
}
