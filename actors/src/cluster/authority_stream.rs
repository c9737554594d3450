//! The authority's key for full members, fresh certificates for guests: over mutual TLS only.

use std::time::Duration;

use ingle_protocol::wire::v2::{AuthorityKey, AuthorityKeyRequest, AuthorityRefused, RenewalRequest, Renewed};
use ingle_protocol::wire::{Body as _, StreamKind, Version, Versioned as _};
use quinn::{Connection, RecvStream, SendStream};
use rustls::pki_types::CertificateDer;
use time::OffsetDateTime;
use tokio::time::timeout;

use super::Mesh;
use super::accept::agreed_version;
use super::link::{STREAM_DEADLINE, open_stream};
use crate::frames::{FrameError, read_body_in, read_frame_in, write_body_in};
use crate::identity::{CertifiedName, Identity, Membership};

/// Answers one request of the certified peer.
pub async fn serve(
    mesh: &Mesh,
    peer: CertifiedName,
    version: Version,
    mut send: SendStream,
    mut receive: RecvStream,
) -> Result<(), FrameError> {
    let frame = read_frame_in(version, &mut receive).await?.ok_or(FrameError::Ended)?;
    let identity = mesh.identity();
    let refusal = |why: &str| AuthorityRefused { why: why.into() };
    match (&identity.signer, frame.kind) {
        (None, _) => write_body_in(version, &mut send, &refusal("this node is a guest and has no authority")).await?,
        (Some(signer), AuthorityKeyRequest::KIND) if peer.membership == Membership::Full => {
            tracing::info!(peer = %peer.node, "gives the authority's key to a full member");
            write_body_in(version, &mut send, &AuthorityKey { pkcs8: signer.key_pkcs8() }).await?;
        }
        (Some(_), AuthorityKeyRequest::KIND) => {
            write_body_in(version, &mut send, &refusal("a guest does not get the authority's key")).await?;
        }
        (Some(signer), _) => {
            let request = RenewalRequest::decode_for(&frame, version)?;
            let name = mesh.roster.lock().get(&peer.node).map(|member| member.name.clone()).unwrap_or_default();
            // The names stay those of the certificate that the peer has shown: nobody becomes more by renewing.
            let signed = signer.sign(&request.csr, peer.node, &name, peer.membership, OffsetDateTime::now_utc());
            match signed {
                Ok(certificate) => {
                    write_body_in(version, &mut send, &Renewed { certificate: certificate.to_vec() }).await?
                }
                Err(error) => write_body_in(version, &mut send, &refusal(&error.to_string())).await?,
            }
        }
    }
    let _ = send.finish();
    let _ = send.stopped().await;
    Ok(())
}

/// Asks a member for the authority's key (PKCS#8).
pub async fn fetch_key(connection: &Connection) -> Result<Vec<u8>, String> {
    let version = agreed_version(connection).ok_or("no version of the protocol is agreed on")?;
    let asking = async {
        let (mut send, mut receive) = open_stream(connection, StreamKind::Authority, STREAM_DEADLINE).await?;
        write_body_in(version, &mut send, &AuthorityKeyRequest {}).await?;
        let frame = read_frame_in(version, &mut receive).await?.ok_or(FrameError::Ended)?;
        Ok::<_, FrameError>(match frame.kind {
            AuthorityRefused::KIND => Err(AuthorityRefused::decode_for(&frame, version)?.why),
            _ => Ok(AuthorityKey::decode_for(&frame, version)?.pkcs8),
        })
    };
    match timeout(STREAM_DEADLINE, asking).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("no answer in time".into()),
    }
}

/// A fresh certificate: by this node's own authority, else by the first full member that answers.
pub async fn renewed(mesh: &Mesh, identity: &Identity, now: OffsetDateTime) -> Result<Identity, String> {
    let csr = identity.renewal_request().map_err(|error| error.to_string())?;
    let names = identity.names;
    if let Some(signer) = &identity.signer {
        let name = mesh.own_facts().member.name;
        let certificate =
            signer.sign(&csr, names.node, &name, names.membership, now).map_err(|error| error.to_string())?;
        return identity.with_certificate(certificate, now).map_err(|error| error.to_string());
    }
    let links: Vec<_> = mesh.roster.lock().values().filter_map(|member| member.link.clone()).collect();
    for link in links.into_iter().filter(|link| link.membership == Membership::Full) {
        let asking = async {
            let (mut send, mut receive) = open_stream(&link.connection, StreamKind::Authority, STREAM_DEADLINE).await?;
            write_body_in(link.version, &mut send, &RenewalRequest { csr: csr.clone() }).await?;
            read_body_in::<Renewed, _>(link.version, &mut receive).await
        };
        if let Ok(Ok(renewed)) = timeout(Duration::from_secs(5), asking).await {
            match identity.with_certificate(CertificateDer::from(renewed.certificate), now) {
                Ok(fresh) => return Ok(fresh),
                Err(error) => tracing::warn!(peer = %link.node, %error, "a renewed certificate that is none"),
            }
        }
    }
    Err("no full member of the cluster answers; start one of them".into())
}
