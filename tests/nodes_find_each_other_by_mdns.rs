//! Members that know no address of each other find one on the local network.

use std::net::UdpSocket;

use crate::harness::*;

#[tokio::test]
async fn nodes_find_each_other_by_mdns() {
    // A socket that is connected sends nothing, but fails where no interface leads outwards.
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    let outward = socket.connect("192.0.2.1:9").is_ok_and(|()| !socket.local_addr().unwrap().ip().is_loopback());
    if !outward {
        eprintln!("skipped: this machine has no network interface but loopback, which has no multicast");
        return;
    }
    let (mut tower, mut mini) =
        (Machine::new("tower").on_the_network(), Machine::new("mini").on_the_network());
    tower.up().await;
    mini.join(&tower).await;
    tower.stop().await;
    for machine in [&tower, &mini] {
        let members = machine.state_dir().join("members.json");
        std::fs::remove_file(members).unwrap_or_else(|error| assert_eq!(machine.name, "tower", "{error}"));
    }
    // On other ports than before, so that nothing but an announcement can lead them to each other.
    tower.up().await;
    mini.up().await;
    tower.until_alive(&[&mini]).await;
    mini.until_alive(&[&tower]).await;
}
