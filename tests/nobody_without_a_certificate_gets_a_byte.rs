//! Nothing crosses the network between nodes but over mutual TLS with a certificate of this cluster.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use crate::harness::*;

/// A stream that begins like a greeting (kind 1), with a length that lies.
const GREETING: &[u8] = b"\x01\x10\xff\xff\xff\xff and so on";

#[tokio::test]
async fn nobody_without_a_certificate_gets_a_byte() {
    let (mut tower, barn) = (Machine::new("tower").model("echo"), Machine::new("barn"));
    tower.up().await;
    // barn founds a cluster of its own.
    barn.ingle(&["token"]).await.ok();

    for (what, alpn, certificate) in [
        ("no certificate", &b"ingle/2"[..], Certificate::None),
        ("no certificate and the last version", b"ingle/1", Certificate::None),
        ("a certificate of another cluster", b"ingle/2", Certificate::Of(&barn)),
        ("another protocol", b"h3", Certificate::None),
        ("another protocol with a certificate of this cluster", b"h3", Certificate::Of(&tower)),
        ("garbage where a joiner speaks", b"ingle-join/1", Certificate::None),
        ("a joiner with another cluster's certificate", b"ingle-join/1", Certificate::Of(&barn)),
    ] {
        let stranger = QuicClient::new(&tower, alpn, &certificate);
        for first in [GREETING, b"\x04", b"\x05", &[0xff; 4096]] {
            let got = stranger.bytes_for(first).await;
            assert!(got.is_empty(), "{what} got {got:?}");
        }
    }

    let quic: SocketAddr = tower.address().parse().unwrap();
    TcpStream::connect(quic).expect_err("nobody takes TCP at the QUIC port");
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.connect(quic).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    for datagram in [&b"hello"[..], &[0; 1200], &[0xff; 1200]] {
        socket.send(datagram).unwrap();
    }
    let _ = socket.recv(&mut [0; 2048]).expect_err("no answer to what is not QUIC");

    assert_eq!(tower.ask(&echo("still here")).await.text(), "still here");
    assert_eq!(tower.status().await.nodes().len(), 1);
}

/// The actors' library insists on a TCP listener of its own.
#[tokio::test]
async fn the_actors_own_listener_lets_nobody_in() {
    let mut tower = Machine::new("tower");
    tower.up().await;
    let listeners = listening_ports(tower.pid());
    assert!(listeners.iter().all(|(ip, _)| ip.is_loopback()), "{listeners:?}");
    let others: Vec<_> = listeners.iter().filter(|(_, port)| *port != tower.http().port()).collect();
    assert!(!others.is_empty(), "this test looks at the wrong thing: {listeners:?}");
    for (ip, port) in others {
        let connect = || {
            let stream = TcpStream::connect((*ip, *port)).unwrap();
            stream.set_read_timeout(Some(DEADLINE)).unwrap();
            stream
        };
        // In the clear.
        let mut stream = connect();
        let _ = stream.write_all(&[0; 64]);
        let mut got = Vec::new();
        let _ = stream.read_to_end(&mut got);
        // A TLS alert (21) is all that anybody hears.
        assert!(got.is_empty() || got[0] == 21, "{got:?}");
        // And with TLS that would believe everything.
        let config = Arc::new(tls(b"", &Certificate::None));
        let mut session = rustls::ClientConnection::new(config, "node.ingle".try_into().unwrap()).unwrap();
        let mut stream = connect();
        session.complete_io(&mut stream).expect_err("no handshake is ever complete");
        assert!(session.is_handshaking());
    }
    assert_eq!(tower.get("/health").await.status, 200);
}
