//! The cluster's own certificate authority. Every full member has it, so that no machine's loss ends the cluster.

use std::time::Duration;

use ingle_protocol::{ClusterId, NodeId};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer, PrivatePkcs8KeyDer};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;

use super::certificate::{ID_SUFFIX, ROLE_SUFFIX};
use super::{IdentityError, Membership, SERVER_NAME};

/// How long a node's certificate lives; it is renewed at two thirds of it.
pub const CERTIFICATE_LIFETIME: Duration = Duration::from_secs(30 * 24 * 3600);
/// Certificates are valid from this much before they are made, for clocks that are a little behind.
const BACKDATED: Duration = Duration::from_secs(3600);
const AUTHORITY_LIFETIME: Duration = Duration::from_secs(20 * 365 * 24 * 3600);

/// The authority's certificate with its key.
pub struct Authority {
    certificate: CertificateDer<'static>,
    key: KeyPair,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Authority({}, key)", Self::cluster_id(&self.certificate))
    }
}

impl Authority {
    /// A new authority: a new cluster.
    pub fn generate(now: OffsetDateTime) -> Result<Self, IdentityError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "Ingle cluster authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        // A day, not an hour: the first node may be the one whose clock is wrong.
        params.not_before = now - Duration::from_secs(24 * 3600);
        params.not_after = now + AUTHORITY_LIFETIME;
        let certificate = params.self_signed(&key)?.der().clone();
        Ok(Self { certificate, key })
    }

    /// From the two parts as they are stored.
    pub fn from_der(certificate: CertificateDer<'static>, pkcs8: &[u8]) -> Result<Self, IdentityError> {
        let key = KeyPair::try_from(&PrivatePkcs8KeyDer::from(pkcs8.to_vec()))?;
        // Fails where the certificate does not parse.
        Issuer::from_ca_cert_der(&certificate, &key)?;
        Ok(Self { certificate, key })
    }

    /// The certificate, DER.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The private key, PKCS#8 DER.
    pub fn key_pkcs8(&self) -> Vec<u8> {
        self.key.serialize_der()
    }

    /// The cluster that this authority makes.
    pub fn cluster_id(certificate: &CertificateDer<'_>) -> ClusterId {
        let hash = Self::fingerprint(certificate);
        let mut id = [0; 16];
        id.copy_from_slice(&hash[..16]);
        ClusterId(id)
    }

    /// SHA-256 of the certificate, as pinned in tokens.
    pub fn fingerprint(certificate: &CertificateDer<'_>) -> [u8; 32] {
        Sha256::digest(certificate).into()
    }

    /// Signs a node's certificate. Only the key is taken from the request; all names are the signer's choice.
    pub fn sign(
        &self,
        request_der: &[u8],
        node: NodeId,
        name: &str,
        membership: Membership,
        now: OffsetDateTime,
    ) -> Result<CertificateDer<'static>, IdentityError> {
        let mut request =
            CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(request_der.to_vec()))?;
        let mut params = CertificateParams::new(vec![
            SERVER_NAME.to_owned(),
            format!("{node}{ID_SUFFIX}"),
            format!("{}{ROLE_SUFFIX}", membership.label()),
        ])?;
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.not_before = now - BACKDATED;
        params.not_after = now + CERTIFICATE_LIFETIME;
        request.params = params;
        let issuer = Issuer::from_ca_cert_der(&self.certificate, &self.key)?;
        Ok(request.signed_by(&issuer)?.der().clone())
    }
}
