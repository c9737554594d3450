//! A QUIC client that believes every server: what a stranger on the network can do.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use quinn::crypto::rustls::QuicClientConfig;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, Error, SignatureScheme};
use serde_json::Value;

use super::{DEADLINE, Machine};

/// What the client shows of itself.
#[derive(Debug)]
pub enum Certificate<'a> {
    None,
    /// That of this machine.
    Of(&'a Machine),
}

/// A client of one machine.
#[derive(Debug)]
pub struct QuicClient {
    endpoint: quinn::Endpoint,
    config: quinn::ClientConfig,
    target: SocketAddr,
}

impl QuicClient {
    /// Talks to `machine` under an application protocol.
    pub fn new(machine: &Machine, alpn: &[u8], certificate: &Certificate<'_>) -> Self {
        let mut config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls(alpn, certificate)).unwrap()));
        let mut transport = quinn::TransportConfig::default();
        transport.keep_alive_interval(Some(Duration::from_secs(1)));
        config.transport_config(Arc::new(transport));
        let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        Self { endpoint, config, target: machine.address().parse().unwrap() }
    }

    /// Opens streams, writes `first` on one, and reads until the other side ends it all: every byte that came on
    /// any stream. What the handshake already refuses yields nothing.
    pub async fn bytes_for(&self, first: &[u8]) -> Vec<u8> {
        let exchange = async {
            let connecting = self.endpoint.connect_with(self.config.clone(), self.target, "node.ingle").unwrap();
            let Ok(connection) = connecting.await else { return Vec::new() };
            let mut got = Vec::new();
            if let Ok((mut send, mut receive)) = connection.open_bi().await {
                let _ = send.write_all(first).await;
                let mut buffer = [0; 1024];
                while let Ok(Some(count)) = receive.read(&mut buffer).await {
                    got.extend_from_slice(&buffer[..count]);
                }
            }
            // Also not on a stream that the node opens.
            if let Ok(mut pushed) = connection.accept_uni().await {
                got.extend(pushed.read_to_end(1024).await.unwrap_or_default());
            }
            connection.closed().await;
            got
        };
        tokio::time::timeout(DEADLINE, exchange).await.expect("the node closes the connection")
    }
}

/// TLS that believes everybody.
pub fn tls(alpn: &[u8], certificate: &Certificate<'_>) -> rustls::ClientConfig {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Credulous));
    let mut tls = match certificate {
        Certificate::None => builder.with_no_client_auth(),
        Certificate::Of(machine) => {
            let (chain, key) = stolen(machine);
            builder.with_client_auth_cert(chain, key).unwrap()
        }
    };
    tls.alpn_protocols = vec![alpn.to_vec()];
    tls
}

/// Certificate and key out of a state directory.
fn stolen(machine: &Machine) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    let file = std::fs::read(machine.state_dir().join("identity.json")).unwrap();
    let identity: Value = serde_json::from_slice(&file).unwrap();
    let bytes = |name: &str| BASE64.decode(identity[name].as_str().unwrap()).unwrap();
    let chain = vec![bytes("certificate").into(), bytes("authority").into()];
    (chain, PrivatePkcs8KeyDer::from(bytes("key")).into())
}

#[derive(Debug)]
struct Credulous;

impl ServerCertVerifier for Credulous {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        rustls::crypto::ring::default_provider().signature_verification_algorithms.supported_schemes()
    }
}
