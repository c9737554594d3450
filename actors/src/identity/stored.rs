//! This node's identity on disk: one private file, so that it is replaced whole or not at all.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use ingle_protocol::{ClusterId, NodeId};
use rcgen::KeyPair;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::tls::verify_chain;
use super::{Authority, CERTIFICATE_LIFETIME, CertifiedName, Membership, read_names, signing_request};
use crate::platform::{read_optional, write_private};

/// Why an identity cannot be made, read or kept.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A certificate or key that cannot be made or read.
    #[error("a certificate or key cannot be made or read: {0}")]
    Certificate(#[from] rcgen::Error),
    /// TLS does not take it.
    #[error("TLS does not take this node's certificate: {0}")]
    Tls(#[from] rustls::Error),
    /// The file is damaged.
    #[error(
        "the identity file {path} is damaged ({why}); restore it from a backup, or remove it to begin a new cluster"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The file cannot be read or written.
    #[error("the identity file {path}: {error}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        error: io::Error,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    version: u32,
    authority: String,
    authority_key: Option<String>,
    certificate: String,
    key: String,
    /// Seconds since 1970, by the clock of the machine that signed.
    signed_at: i64,
    name: String,
}

/// A node's certificate and key, and the authority that it trusts.
pub struct Identity {
    /// The node and what it may do.
    pub names: CertifiedName,
    /// The cluster.
    pub cluster: ClusterId,
    /// The authority's certificate.
    pub authority: CertificateDer<'static>,
    /// The authority with its key, on full members.
    pub signer: Option<Authority>,
    /// This node's certificate.
    pub certificate: CertificateDer<'static>,
    /// The name under which the node last ran or joined.
    pub name: String,
    key_pkcs8: Vec<u8>,
    signed_at: OffsetDateTime,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Keys have no business in logs.
        f.debug_struct("Identity").field("names", &self.names).field("name", &self.name).finish_non_exhaustive()
    }
}

impl Identity {
    fn path(state_dir: &Path) -> PathBuf {
        state_dir.join("identity.json")
    }

    /// The identity in the state directory, if there is one.
    pub fn load(state_dir: &Path) -> Result<Option<Self>, IdentityError> {
        let path = Self::path(state_dir);
        let Some(bytes) = read_optional(&path).map_err(|error| IdentityError::Io { path: path.clone(), error })? else {
            return Ok(None);
        };
        let damaged = |why: String| IdentityError::Damaged { path: path.clone(), why };
        let file: File = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        let decode = |text: &str| BASE64.decode(text).map_err(|error| damaged(error.to_string()));
        let authority = CertificateDer::from(decode(&file.authority)?);
        let authority_key = file.authority_key.as_deref().map(decode).transpose()?;
        let signed_at =
            OffsetDateTime::from_unix_timestamp(file.signed_at).map_err(|error| damaged(error.to_string()))?;
        let certificate = CertificateDer::from(decode(&file.certificate)?);
        Self::assemble(authority, authority_key, certificate, decode(&file.key)?, &file.name, signed_at)
            .map_err(|error| damaged(error.to_string()))
            .map(Some)
    }

    /// From its parts, checked against each other.
    pub fn assemble(
        authority: CertificateDer<'static>,
        authority_key: Option<Vec<u8>>,
        certificate: CertificateDer<'static>,
        key_pkcs8: Vec<u8>,
        name: &str,
        signed_at: OffsetDateTime,
    ) -> Result<Self, IdentityError> {
        let names = read_names(&certificate).ok_or(rcgen::Error::CouldNotParseCertificate)?;
        KeyPair::try_from(&PrivatePkcs8KeyDer::from(key_pkcs8.clone()))?;
        let signer = authority_key.map(|key| Authority::from_der(authority.clone(), &key)).transpose()?;
        let cluster = Authority::cluster_id(&authority);
        Ok(Self { names, cluster, authority, signer, certificate, name: name.to_owned(), key_pkcs8, signed_at })
    }

    /// Checks that the authority signed this certificate, and that its key, where there is one, is its own.
    /// For what came over the network: a stored identity may have expired while the machine was off.
    pub fn verify(&self) -> Result<(), IdentityError> {
        verify_chain(&self.authority, &self.certificate)?;
        if let Some(signer) = &self.signer {
            let now = OffsetDateTime::now_utc();
            let sample =
                signer.sign(&self.renewal_request()?, self.names.node, &self.name, self.names.membership, now)?;
            verify_chain(&self.authority, &sample)?;
        }
        Ok(())
    }

    /// A new cluster with this node as its only member. Not stored yet.
    pub fn found_cluster(node: NodeId, name: &str, now: OffsetDateTime) -> Result<Self, IdentityError> {
        let authority = Authority::generate(now)?;
        let key = KeyPair::generate()?;
        let certificate = authority.sign(&signing_request(&key)?, node, name, Membership::Full, now)?;
        let authority_key = authority.key_pkcs8();
        Self::assemble(
            authority.certificate().clone(),
            Some(authority_key),
            certificate,
            key.serialize_der(),
            name,
            now,
        )
    }

    /// Stores it; when this returns it survives kill -9.
    pub fn store(&self, state_dir: &Path) -> Result<(), IdentityError> {
        let path = Self::path(state_dir);
        let file = File {
            version: 1,
            authority: BASE64.encode(&self.authority),
            authority_key: self.signer.as_ref().map(|signer| BASE64.encode(signer.key_pkcs8())),
            certificate: BASE64.encode(&self.certificate),
            key: BASE64.encode(&self.key_pkcs8),
            signed_at: self.signed_at.unix_timestamp(),
            name: self.name.clone(),
        };
        serde_json::to_vec_pretty(&file)
            .map_err(io::Error::other)
            .and_then(|bytes| write_private(&path, &bytes))
            .map_err(|error| IdentityError::Io { path, error })
    }

    /// This node's private key.
    pub fn key(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.key_pkcs8.clone()).into()
    }

    /// A request for a fresh certificate for the same key.
    pub fn renewal_request(&self) -> Result<Vec<u8>, IdentityError> {
        signing_request(&KeyPair::try_from(&PrivatePkcs8KeyDer::from(self.key_pkcs8.clone()))?)
    }

    /// Two thirds of the certificate's life are over.
    pub fn is_due_for_renewal(&self, now: OffsetDateTime) -> bool {
        // A certificate from the future is one of a clock that was wrong.
        now - self.signed_at >= CERTIFICATE_LIFETIME * 2 / 3 || self.signed_at - now > Duration::from_secs(3600)
    }

    /// How long until [`Self::is_due_for_renewal`].
    pub fn renewal_due_in(&self, now: OffsetDateTime) -> Duration {
        Duration::try_from(self.signed_at + CERTIFICATE_LIFETIME * 2 / 3 - now).unwrap_or_default()
    }

    /// The same identity with a fresh certificate.
    pub fn with_certificate(
        &self,
        certificate: CertificateDer<'static>,
        signed_at: OffsetDateTime,
    ) -> Result<Self, IdentityError> {
        let authority_key = self.signer.as_ref().map(Authority::key_pkcs8);
        let renewed = Self::assemble(
            self.authority.clone(),
            authority_key,
            certificate,
            self.key_pkcs8.clone(),
            &self.name,
            signed_at,
        )?;
        if renewed.names != self.names {
            return Err(rcgen::Error::CouldNotParseCertificate.into());
        }
        verify_chain(&renewed.authority, &renewed.certificate)?;
        Ok(renewed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_survives_its_file_and_a_damaged_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Identity::load(folder.path()).unwrap().is_none());
        let now = OffsetDateTime::now_utc();
        let made = Identity::found_cluster(NodeId([7; 16]), "tower", now).unwrap();
        made.store(folder.path()).unwrap();
        let loaded = Identity::load(folder.path()).unwrap().unwrap();
        assert_eq!(loaded.names, CertifiedName { node: NodeId([7; 16]), membership: Membership::Full });
        assert_eq!((loaded.cluster, loaded.certificate), (made.cluster, made.certificate));
        assert!(loaded.signer.is_some());
        std::fs::write(folder.path().join("identity.json"), "{").unwrap();
        let error = Identity::load(folder.path()).unwrap_err().to_string();
        assert!(error.contains("identity.json") && error.contains("remove it"), "{error}");
    }

    #[test]
    fn certificates_are_renewed_at_two_thirds_and_keep_their_node() {
        let now = OffsetDateTime::now_utc();
        let day = Duration::from_secs(24 * 3600);
        let old = Identity::found_cluster(NodeId([7; 16]), "tower", now - 21 * day).unwrap();
        assert!(old.is_due_for_renewal(now) && !old.is_due_for_renewal(now - 2 * day));
        let signer = old.signer.as_ref().unwrap();
        let sign = |node| signer.sign(&old.renewal_request().unwrap(), node, "tower", Membership::Full, now).unwrap();
        let fresh = old.with_certificate(sign(NodeId([7; 16])), now).unwrap();
        assert!(!fresh.is_due_for_renewal(now));
        assert!(old.with_certificate(sign(NodeId([8; 16])), now).is_err());
        fresh.verify().unwrap();
        // The right names under a stranger's signature.
        let stranger = Authority::generate(now).unwrap();
        let request = old.renewal_request().unwrap();
        let forged = stranger.sign(&request, NodeId([7; 16]), "tower", Membership::Full, now).unwrap();
        assert!(old.with_certificate(forged, now).is_err());
    }
}
