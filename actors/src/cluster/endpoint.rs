//! The node's QUIC socket.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use quinn::{AckFrequencyConfig, IdleTimeout, TransportConfig, VarInt};
use socket2::{Domain, Protocol, Socket, Type};

/// A silent peer is gone after this long: the bound on how late we learn of a dead machine.
pub const IDLE_TIMEOUT: Duration = Duration::from_millis(1_500);
const KEEP_ALIVE: Duration = Duration::from_millis(500);
/// Streams that a peer may have open with us at a time. Each slot costs memory whether used or not; at the limit the
/// peer's requests are refused as busy.
const MOST_STREAMS: u32 = 1_024;
/// Bytes in flight: per stream, and per connection in each direction.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;

/// Packets that may come before one goes back, within 25 ms.
const ACKNOWLEDGED_AFTER: u32 = 9;

/// Limits of every connection.
pub fn transport() -> Arc<TransportConfig> {
    let mut transport = TransportConfig::default();
    // 1,500 ms fits a QUIC variable-length integer.
    transport.max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(IDLE_TIMEOUT.as_millis() as u32))));
    transport.keep_alive_interval(Some(KEEP_ALIVE));
    transport.max_concurrent_bidi_streams(MOST_STREAMS.into());
    transport.max_concurrent_uni_streams(8u32.into());
    transport.stream_receive_window(STREAM_WINDOW.into());
    transport.receive_window(CONNECTION_WINDOW.into());
    transport.send_window(CONNECTION_WINDOW.into());
    // Tokens come one to a packet, in a stream that is acknowledged soon enough by what goes back anyway.
    let mut acknowledging = AckFrequencyConfig::default();
    acknowledging.ack_eliciting_threshold(ACKNOWLEDGED_AFTER.into());
    transport.ack_frequency_config(Some(acknowledging));
    Arc::new(transport)
}

/// Opens the socket. `[::]` takes both IP families; where the system has no IPv6 it falls back to `0.0.0.0`.
pub fn bind(address: SocketAddr) -> io::Result<quinn::Endpoint> {
    let socket = match open(address) {
        Err(error) if address.ip().is_unspecified() && address.is_ipv6() && !is_taken(&error) => {
            open(SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), address.port()))?
        }
        other => other?,
    };
    let runtime = quinn::default_runtime().ok_or_else(|| io::Error::other("no async runtime"))?;
    quinn::Endpoint::new(quinn::EndpointConfig::default(), None, socket, runtime)
}

fn open(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}

fn is_taken(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied)
}

/// An address as people write it: an IPv4 address that came in through an IPv6 socket loses its disguise.
pub fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_unspecified_address_takes_both_families_and_a_taken_port_is_an_error() {
        let endpoint = bind("[::]:0".parse().unwrap()).unwrap();
        let port = endpoint.local_addr().unwrap().port();
        let error = bind(SocketAddr::new("127.0.0.1".parse().unwrap(), port)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        assert_eq!(plain("[::ffff:10.0.0.1]:5".parse().unwrap()), "10.0.0.1:5".parse().unwrap());
    }
}
