//! TLS of the QUIC socket: mutual between members, pinned for those who join.

use std::sync::{Arc, LazyLock};

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{DigitallySignedStruct, RootCertStore, SignatureScheme};

use ingle_protocol::wire::{FILES_ALPN, JOIN_ALPN, Version};

use super::{Authority, Identity, IdentityError};

/// The DNS name that every node's certificate carries.
pub const SERVER_NAME: &str = "node.ingle";

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Makes `ring` the process's crypto provider (one of our libraries brings a second one along, so that rustls
/// cannot choose by itself). Call it first in `main`.
pub fn install_crypto_provider() {
    // An error means that one is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// The versions that this node offers to members, newest first.
///
/// `INGLE_PROTOCOL_LIMIT` (a number) leaves out newer ones. It is for the test that lets nodes of two versions work
/// together, and for nothing else: no setting has it.
static OFFERED: LazyLock<Vec<Version>> = LazyLock::new(|| {
    let limit = std::env::var("INGLE_PROTOCOL_LIMIT").ok().and_then(|limit| limit.parse::<u8>().ok());
    let offered = |version: &Version| limit.is_none_or(|limit| version.number() <= limit);
    Version::ALL.iter().copied().filter(offered).collect()
});

fn mesh_alpns() -> impl Iterator<Item = Vec<u8>> {
    OFFERED.iter().map(|version| version.alpn().to_vec())
}

/// Nodes of the last version give no files.
fn files_alpn() -> Option<Vec<u8>> {
    OFFERED.contains(&Version::OF_FILES).then(|| FILES_ALPN.to_vec())
}

/// What a member's QUIC socket needs.
#[derive(Debug)]
pub struct TlsConfigs {
    /// For connections that come in: members with a certificate, and joiners without one under their own ALPN.
    pub server: quinn::ServerConfig,
    /// For connections to members.
    pub client: quinn::ClientConfig,
    /// For connections to members that carry files.
    pub files: quinn::ClientConfig,
}

impl TlsConfigs {
    /// Both sides for `identity`, with `transport` for both.
    pub fn new(identity: &Identity, transport: Arc<quinn::TransportConfig>) -> Result<Self, IdentityError> {
        let mut roots = RootCertStore::empty();
        roots.add(identity.authority.clone())?;
        let roots = Arc::new(roots);
        // The authority goes along, for joiners who know its hash only.
        let chain = vec![identity.certificate.clone(), identity.authority.clone()];

        // Joiners have no certificate yet, so TLS must let them pass. Whoever has none and offers a mesh ALPN is
        // closed before a byte of his is read: see cluster::accept.
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider())
            .allow_unauthenticated()
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        let mut server = rustls::ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), identity.key())?;
        server.alpn_protocols = mesh_alpns().chain(files_alpn()).chain([JOIN_ALPN.to_vec()]).collect();

        let mut client = rustls::ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, identity.key())?;
        client.alpn_protocols = mesh_alpns().collect();
        let mut files = client.clone();
        files.alpn_protocols = vec![FILES_ALPN.to_vec()];

        let no_suite = |_| rustls::Error::General("no initial cipher suite".into());
        let mut server =
            quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(server).map_err(no_suite)?));
        server.transport_config(transport.clone());
        let mut client = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(client).map_err(no_suite)?));
        client.transport_config(transport.clone());
        let mut files = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(files).map_err(no_suite)?));
        files.transport_config(transport);
        Ok(Self { server, client, files })
    }
}

/// The TLS of a machine that joins: no certificate of its own, the authority known by its hash.
pub fn joiner_config(authority_hash: [u8; 32]) -> Result<quinn::ClientConfig, IdentityError> {
    let mut client = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(PinnedAuthority { authority_hash }))
        .with_no_client_auth();
    client.alpn_protocols = vec![JOIN_ALPN.to_vec()];
    let client =
        QuicClientConfig::try_from(client).map_err(|_| rustls::Error::General("no initial cipher suite".into()))?;
    Ok(quinn::ClientConfig::new(Arc::new(client)))
}

/// Was `certificate` signed by `authority`, and is it valid now?
pub(super) fn verify_chain(
    authority: &CertificateDer<'_>,
    certificate: &CertificateDer<'_>,
) -> Result<(), rustls::Error> {
    let name = ServerName::try_from(SERVER_NAME).map_err(|error| rustls::Error::General(error.to_string()))?;
    verify_server(authority, certificate, &name, &[], UnixTime::now()).map(drop)
}

fn verify_server(
    authority: &CertificateDer<'_>,
    certificate: &CertificateDer<'_>,
    name: &ServerName<'_>,
    ocsp_response: &[u8],
    now: UnixTime,
) -> Result<ServerCertVerified, rustls::Error> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.clone().into_owned())?;
    WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider())
        .build()
        .map_err(|error| rustls::Error::General(error.to_string()))?
        .verify_server_cert(certificate, &[], name, ocsp_response, now)
}

/// Accepts a server whose chain ends in the one authority whose hash we were told. Everything else is rustls'
/// own verification.
#[derive(Debug)]
struct PinnedAuthority {
    authority_hash: [u8; 32],
}

impl ServerCertVerifier for PinnedAuthority {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let authority = intermediates
            .iter()
            .find(|certificate| Authority::fingerprint(certificate) == self.authority_hash)
            .ok_or(rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer))?;
        verify_server(authority, end_entity, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("QUIC has TLS 1.3 only".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}
