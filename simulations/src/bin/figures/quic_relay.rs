//! What two hops over QUIC with mutual TLS cost at least: HTTP comes in, each request is one bidirectional stream with
//! frames of `kind u8 · length u32 · body`, HTTP goes out at the far side. Nothing is decoded, chosen or watched, so this
//! is the floor of `ingle`'s own path, which has the same shape.
//!
//! Both sides use one certificate, made by the worker, which prints where it has put it.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Request, Response, StatusCode};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{Connection, Endpoint, RecvStream, SendStream, TransportConfig, VarInt};
use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::WebPkiClientVerifier;
use tokio::sync::mpsc;

use crate::http::{BODY_BUFFER, Body, Pool, serve, streamed, whole};
use crate::{Error, announce, any_port, listen};

/// The same numbers as on Ingle's wire.
const INFERENCE_STREAM: u8 = 4;
const REQUEST: u8 = 0x10;
const ACCEPTED: u8 = 0x11;
const TOKEN: u8 = 0x14;
const FINISHED: u8 = 0x15;
/// Longer frames are an error.
const MOST: usize = 1 << 20;
const NAME: &str = "relay";

#[derive(Debug, clap::Args)]
pub struct IngressOptions {
    /// Where the worker is.
    #[arg(long)]
    to: SocketAddr,
    /// The folder with the worker's certificate.
    #[arg(long)]
    folder: PathBuf,
}

#[derive(Debug, clap::Args)]
pub struct WorkerOptions {
    /// The HTTP server.
    #[arg(long)]
    to: SocketAddr,
    /// Where to write the certificate.
    #[arg(long)]
    folder: PathBuf,
}

fn transport() -> Arc<TransportConfig> {
    let mut transport = TransportConfig::default();
    transport.keep_alive_interval(Some(Duration::from_millis(500)));
    transport.max_concurrent_bidi_streams(VarInt::from_u32(1_024));
    Arc::new(transport)
}

fn identity(folder: &Path) -> Result<(CertificateDer<'static>, PrivateKeyDer<'static>, RootCertStore), Error> {
    let certificate = CertificateDer::from(fs::read(folder.join("certificate.der"))?);
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(fs::read(folder.join("key.der"))?));
    let mut roots = RootCertStore::empty();
    roots.add(certificate.clone())?;
    Ok((certificate, key, roots))
}

// ---------------------------------------------------------------------------------------------------------------
// Frames

async fn write_frame(send: &mut SendStream, kind: u8, body: &[u8]) -> Result<(), Error> {
    let mut frame = BytesMut::with_capacity(5 + body.len());
    frame.put_u8(kind);
    frame.put_u32_le(u32::try_from(body.len())?);
    frame.put_slice(body);
    Ok(send.write_all(&frame).await?)
}

async fn read_frame(receive: &mut RecvStream) -> Result<(u8, Bytes), Error> {
    let mut head = [0; 5];
    receive.read_exact(&mut head).await?;
    let [kind, length @ ..] = head;
    let length = u32::from_le_bytes(length) as usize;
    if length > MOST {
        return Err("a frame that is too long".into());
    }
    let mut body = vec![0; length];
    receive.read_exact(&mut body).await?;
    Ok((kind, body.into()))
}

// ---------------------------------------------------------------------------------------------------------------
// The worker's side

/// Serves streams until the end.
pub async fn worker(options: WorkerOptions) -> Result<(), Error> {
    let made = rcgen::generate_simple_self_signed(vec![NAME.to_owned()])?;
    fs::write(options.folder.join("certificate.der"), made.cert.der())?;
    fs::write(options.folder.join("key.der"), made.signing_key.serialize_der())?;
    let (certificate, key, roots) = identity(&options.folder)?;
    let clients = WebPkiClientVerifier::builder(Arc::new(roots)).build()?;
    let tls =
        rustls::ServerConfig::builder().with_client_cert_verifier(clients).with_single_cert(vec![certificate], key)?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
    config.transport_config(transport());
    let endpoint = Endpoint::server(config, any_port())?;
    announce(endpoint.local_addr()?);
    let pool = Arc::new(Pool::new(options.to));
    while let Some(incoming) = endpoint.accept().await {
        let pool = pool.clone();
        tokio::spawn(async move {
            let connection = incoming.await?;
            loop {
                let (send, receive) = connection.accept_bi().await?;
                tokio::spawn(serve_stream(send, receive, pool.clone()));
            }
            #[allow(unreachable_code, reason = "says the type of the errors above")]
            Ok::<(), Error>(())
        });
    }
    Ok(())
}

async fn serve_stream(mut send: SendStream, mut receive: RecvStream, pool: Arc<Pool>) -> Result<(), Error> {
    let mut kind = [0];
    receive.read_exact(&mut kind).await?;
    let (REQUEST, body) = read_frame(&mut receive).await? else { return Err("no request".into()) };
    let mut lease = pool.connection().await?;
    let response = pool.post(&mut lease, body, &[]).await?;
    let kind = response.headers().get(CONTENT_TYPE).map_or(&b"text/plain"[..], HeaderValue::as_bytes);
    write_frame(&mut send, ACCEPTED, kind).await?;
    let mut body = response.into_body();
    while let Some(piece) = body.frame().await {
        if let Ok(piece) = piece?.into_data() {
            write_frame(&mut send, TOKEN, &piece).await?;
        }
    }
    write_frame(&mut send, FINISHED, &[]).await?;
    send.finish()?;
    pool.give_back(lease).await;
    Ok(())
}

// ---------------------------------------------------------------------------------------------------------------
// The ingress's side

/// Serves HTTP until the end.
pub async fn ingress(options: IngressOptions) -> Result<(), Error> {
    let (certificate, key, roots) = identity(&options.folder)?;
    let tls =
        rustls::ClientConfig::builder().with_root_certificates(roots).with_client_auth_cert(vec![certificate], key)?;
    let mut config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
    config.transport_config(transport());
    let mut endpoint = Endpoint::client(any_port())?;
    endpoint.set_default_client_config(config);
    let connection = endpoint.connect(options.to, NAME)?.await?;
    let listener = listen(0).await?;
    serve(listener, move |request| {
        let connection = connection.clone();
        async move {
            relay(request, connection).await.unwrap_or_else(|error| {
                let mut response = Response::new(whole(error.to_string()));
                *response.status_mut() = StatusCode::BAD_GATEWAY;
                response
            })
        }
    })
    .await
}

async fn relay(request: Request<Incoming>, connection: Connection) -> Result<Response<Body>, Error> {
    let body = request.into_body().collect().await?.to_bytes();
    let (mut send, mut receive) = connection.open_bi().await?;
    send.write_all(&[INFERENCE_STREAM]).await?;
    write_frame(&mut send, REQUEST, &body).await?;
    let (ACCEPTED, kind) = read_frame(&mut receive).await? else { return Err("no answer".into()) };
    let (pieces, reader) = mpsc::channel(BODY_BUFFER);
    tokio::spawn(async move {
        // Open until the answer has ended, as Ingle's are.
        let _send = send;
        while let Ok((TOKEN, piece)) = read_frame(&mut receive).await {
            if pieces.send(piece).await.is_err() {
                return;
            }
        }
    });
    let mut response = Response::new(streamed(reader));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_bytes(&kind)?);
    Ok(response)
}
