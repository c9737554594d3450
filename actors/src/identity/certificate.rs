//! Node certificates: which names they carry and how to read them back.
//!
//! Every node's certificate has three DNS names: [`SERVER_NAME`](super::SERVER_NAME), the same for all, so that a
//! node can be dialled before its id is known; `<node id>.id.ingle`; and `full.role.ingle` or `guest.role.ingle`.

use ingle_protocol::NodeId;
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::CertificateDer;

use super::IdentityError;

pub(super) const ID_SUFFIX: &str = ".id.ingle";
pub(super) const ROLE_SUFFIX: &str = ".role.ingle";

/// What a member may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Membership {
    /// Has the authority's key: signs, renews and prints tokens.
    Full,
    /// Has a certificate only.
    Guest,
}

impl Membership {
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Guest => "guest",
        }
    }
}

/// What a certificate says about its node. Worth something only where the chain was verified before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CertifiedName {
    /// The node.
    pub node: NodeId,
    /// What it may do.
    pub membership: Membership,
}

/// Reads the names out of a node's certificate. `None` for certificates that are not a node's.
pub fn read_names(certificate: &CertificateDer<'_>) -> Option<CertifiedName> {
    let parsed = webpki::EndEntityCert::try_from(certificate).ok()?;
    let mut node = None;
    let mut membership = None;
    for name in parsed.valid_dns_names() {
        if let Some(id) = name.strip_suffix(ID_SUFFIX) {
            node = id.parse().ok();
        } else if let Some(role) = name.strip_suffix(ROLE_SUFFIX) {
            membership = [Membership::Full, Membership::Guest].into_iter().find(|m| m.label() == role);
        }
    }
    Some(CertifiedName { node: node?, membership: membership? })
}

/// A request for a certificate for `key`. It carries no names: the signer chooses them.
pub fn signing_request(key: &KeyPair) -> Result<Vec<u8>, IdentityError> {
    let request = CertificateParams::default().serialize_request(key)?;
    Ok(request.der().to_vec())
}
