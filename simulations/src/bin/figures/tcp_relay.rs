//! Bytes from one TCP connection to another.

use std::net::SocketAddr;

use tokio::net::TcpStream;

use crate::{Error, listen};

#[derive(Debug, clap::Args)]
pub struct Options {
    /// Where to.
    #[arg(long)]
    to: SocketAddr,
    /// The port to listen at.
    #[arg(long, default_value_t = 0)]
    port: u16,
}

/// Relays until the end.
pub async fn run(options: Options) -> Result<(), Error> {
    let listener = listen(options.port).await?;
    loop {
        let (mut near, _) = listener.accept().await?;
        tokio::spawn(async move {
            let mut far = TcpStream::connect(options.to).await?;
            near.set_nodelay(true)?;
            far.set_nodelay(true)?;
            tokio::io::copy_bidirectional(&mut near, &mut far).await
        });
    }
}
