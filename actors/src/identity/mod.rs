//! Who this node is, whom it trusts, and how others come to be trusted.

mod authority;
mod certificate;
mod stored;
mod tls;
mod token;

pub use authority::{Authority, CERTIFICATE_LIFETIME};
pub use certificate::{CertifiedName, Membership, read_names, signing_request};
pub use stored::{Identity, IdentityError};
pub use tls::{SERVER_NAME, TlsConfigs, install_crypto_provider, joiner_config};
pub use token::{JoinToken, RedeemError, TokenBook, TokenError, join_proof};
