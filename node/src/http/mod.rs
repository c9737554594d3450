//! HTTP for programs on this machine.

mod admin;
mod authenticate;
mod body;
mod events;
mod guard;
mod health;
mod openai;
mod request_id;
mod server;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::http::{Method, Uri};
use axum::middleware::{from_fn, from_fn_with_state};
use axum::routing::{get, post};
use ingle_actors::Node;
use tokio::sync::Semaphore;

pub use body::MEMORY_KIB as BODY_MEMORY_KIB;
pub use guard::Guard;
use openai::{ApiError, chat_completions, embeddings, models};
pub use server::{Server, bind};

/// What the handlers work with.
#[derive(Debug)]
pub struct App {
    /// The node behind it all.
    pub node: Arc<Node>,
    /// The longest request body in bytes.
    pub body_limit: usize,
    /// What all request bodies together may take, in KiB.
    pub body_memory: Arc<Semaphore>,
    /// How long an answer is still worth something.
    pub request_timeout: Duration,
    /// No new requests any more.
    pub draining: AtomicBool,
}

impl App {
    /// New requests are welcome.
    pub fn is_accepting(&self) -> bool {
        !self.draining.load(Ordering::Relaxed) && self.node.is_accepting()
    }
}

/// All routes.
pub fn routes(app: Arc<App>, guard: Guard) -> Router {
    let routes = Router::new()
        .route("/v1/chat/completions", post(chat_completions::create))
        .route("/v1/embeddings", post(embeddings::create))
        .route("/v1/models", get(models::list))
        // A model's name may have slashes in it.
        .route("/v1/models/{*id}", get(models::retrieve))
        .route("/admin/models", get(admin::list))
        .route("/admin/events", get(events::follow))
        .route("/health", get(health::health))
        .route("/ready", get(health::ready))
        .with_state(app);
    around(routes, guard)
}

/// What stands around every route, those that do not exist included.
fn around(routes: Router, guard: Guard) -> Router {
    routes
        .fallback(async |method: Method, uri: Uri| ApiError::no_route(method.as_str(), uri.path()))
        .method_not_allowed_fallback(async |method: Method, uri: Uri| {
            ApiError::wrong_method(method.as_str(), uri.path())
        })
        .layer(from_fn(authenticate::authenticate))
        .layer(from_fn_with_state(Arc::new(guard), guard::guard))
        .layer(from_fn(request_id::request_id))
}
