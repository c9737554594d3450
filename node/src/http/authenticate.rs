//! On whose behalf is a request? Until accounts are built everybody who reaches the loopback address is one person.

use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;

use crate::ingress::LOCAL_PRINCIPAL;

/// On whose behalf a request is; stands in its extensions.
#[derive(Debug, Clone)]
pub struct Principal(pub String);

/// The middleware.
pub async fn authenticate(mut request: Request, next: Next) -> Response {
    request.extensions_mut().insert(Principal(LOCAL_PRINCIPAL.into()));
    next.run(request).await
}
