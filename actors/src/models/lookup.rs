//! Names of servers that give files, looked up once each, and which of their addresses may be connected to.
//!
//! What is fetched is often named by somebody else: a registry, a redirect. Such a name must not lead into the
//! household's own network. What the user named himself may.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use reqwest::Url;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};

/// The most names that one client looks up.
const MOST_NAMES: usize = 32;

/// Looks names up for one client: each once, so that what was checked is what is connected to.
#[derive(Debug, Clone)]
pub(super) struct CheckedNames {
    named: Arc<HashSet<String>>,
    known: Arc<Mutex<HashMap<String, Vec<SocketAddr>>>>,
}

impl CheckedNames {
    /// `named` are hosts that the user named; those of the system's proxies are too.
    pub(super) fn new(named: impl IntoIterator<Item = String>) -> Self {
        let proxies = ["http_proxy", "https_proxy", "all_proxy"].into_iter().flat_map(|name| {
            [name.to_owned(), name.to_uppercase()].into_iter().filter_map(|name| {
                let text = std::env::var(name).ok()?;
                let url: Url = text.parse().or_else(|_| format!("http://{text}").parse()).ok()?;
                Some(host_of(&url))
            })
        });
        let named = named.into_iter().chain(proxies).filter(|host| !host.is_empty()).collect();
        Self { named: Arc::new(named), known: Arc::default() }
    }

    /// Why the host of this address must not be connected to, as far as its text says: names are checked when they are
    /// looked up, addresses here.
    pub(super) fn objection(&self, url: &Url) -> Option<String> {
        let host = host_of(url);
        let ip: IpAddr = host.parse().ok()?;
        (!is_public(ip) && !self.named.contains(&host)).then(|| not_public(&host, ip))
    }

    fn check(&self, host: &str, found: Vec<SocketAddr>) -> io::Result<Vec<SocketAddr>> {
        if self.named.contains(host) {
            return Ok(found);
        }
        // One address of the household is enough: who answers a name with both wants us to choose wrongly.
        match found.iter().find(|address| !is_public(address.ip())) {
            Some(address) => Err(io::Error::new(io::ErrorKind::PermissionDenied, not_public(host, address.ip()))),
            None => Ok(found),
        }
    }
}

fn not_public(host: &str, ip: IpAddr) -> String {
    let what = if ip.is_loopback() { "this machine itself" } else { "a private or special network" };
    let leads = if host == ip.to_string() { format!("{ip} is") } else { format!("{host} leads to {ip},") };
    format!("{leads} an address of {what}: refused, because nobody here named it")
}

/// The host as text, without the brackets of IPv6.
pub(super) fn host_of(url: &Url) -> String {
    url.host_str().unwrap_or_default().trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase()
}

/// A host that can only be meant for the household: an address, or a name of no public zone. Who types it means it.
pub(super) fn is_local_name(host: &str) -> bool {
    host.parse::<IpAddr>().is_ok()
        || !host.contains('.')
        || [".local", ".lan", ".internal", ".home.arpa", ".localhost"].iter().any(|zone| host.ends_with(zone))
}

impl Resolve for CheckedNames {
    fn resolve(&self, name: Name) -> Resolving {
        let names = self.clone();
        Box::pin(async move {
            let host = name.as_str().to_ascii_lowercase();
            let known = names.known.lock().unwrap_or_else(PoisonError::into_inner).get(&host).cloned();
            let found = match known {
                Some(found) => found,
                None => {
                    let found = tokio::net::lookup_host((host.as_str(), 0)).await?.collect();
                    let found = names.check(&host, found)?;
                    let mut known = names.known.lock().unwrap_or_else(PoisonError::into_inner);
                    if known.len() >= MOST_NAMES {
                        return Err(io::Error::other("too many names for one file").into());
                    }
                    known.insert(host, found.clone());
                    found
                }
            };
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

/// An address of the public Internet.
pub(super) fn is_public(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => is_public_v4(ip),
        IpAddr::V6(ip) => is_public_v6(ip),
    }
}

fn is_public_v4(ip: Ipv4Addr) -> bool {
    let [a, b, c, _] = ip.octets();
    let special = match (a, b, c) {
        // "This network", shared address space of providers (RFC 6598), protocol assignments, benchmarks.
        (0, _, _) | (100, 64..=127, _) | (192, 0, 0) | (198, 18..=19, _) => true,
        // Reserved.
        (240..=255, _, _) => true,
        _ => false,
    };
    !(special
        || ip.is_private()
        || ip.is_loopback()
        || ip.is_link_local()
        || ip.is_multicast()
        || ip.is_documentation()
        || ip.is_broadcast())
}

fn is_public_v6(ip: Ipv6Addr) -> bool {
    let segments = ip.segments();
    let [first, second, ..] = segments;
    // Behind these prefixes stands an IPv4 address: NAT64, 6to4, and the old compatible form.
    let inner = |high: u16, low: u16| Ipv4Addr::from((u32::from(high) << 16) | u32::from(low));
    match (first, second) {
        (0x64, 0xff9b) => is_public_v4(inner(segments[6], segments[7])),
        (0x2002, _) => is_public_v4(inner(segments[1], segments[2])),
        (0x2001, 0x0db8 | 0x0000) => false,
        // Only this part is given out; the rest is special in one way or another.
        _ => first & 0xe000 == 0x2000,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_of_the_public_internet_are_public() {
        for public in ["1.1.1.1", "18.64.0.1", "100.63.0.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"] {
            assert!(is_public(public.parse().unwrap()), "{public}");
        }
        for not in [
            "127.0.0.1",
            "0.0.0.0",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "198.18.0.1",
            "::1",
            "::",
            "fe80::1",
            "fc00::1",
            "fd12::1",
            "ff02::1",
            "::ffff:10.0.0.1",
            "::ffff:127.0.0.1",
            "64:ff9b::a00:1",
            "2002:7f00:1::",
            "2001:db8::1",
            "::7f00:1",
        ] {
            assert!(!is_public(not.parse().unwrap()), "{not}");
        }
    }

    #[tokio::test]
    async fn a_name_that_leads_into_the_household_is_refused_unless_it_was_named() {
        let resolve = async |names: &CheckedNames| {
            names.resolve("localhost".parse().unwrap()).await.map(Iterator::count).map_err(|error| error.to_string())
        };
        let error = resolve(&CheckedNames::new([])).await.unwrap_err();
        assert!(error.contains("localhost leads to") && error.contains("this machine itself"), "{error}");
        assert!(resolve(&CheckedNames::new(["localhost".into()])).await.unwrap() > 0);
        // One bad address among good ones is enough.
        let mixed = ["1.1.1.1:0", "10.0.0.1:0"].map(|address| address.parse().unwrap());
        assert!(CheckedNames::new([]).check("x.example", mixed.to_vec()).is_err());
    }

    #[test]
    fn addresses_are_checked_as_text_and_local_names_are_told() {
        let names = CheckedNames::new(["192.168.1.5".into()]);
        let objection = |url: &str| names.objection(&url.parse().unwrap());
        assert_eq!(objection("https://192.168.1.5/m"), None);
        assert_eq!(objection("https://1.1.1.1/m"), None);
        assert!(objection("https://169.254.169.254/latest").unwrap().contains("private or special"));
        assert!(objection("https://[::1]/m").is_some() && objection("https://0x7f000001/m").is_some());
        assert!(["nas", "nas.local", "10.0.0.1", "::1"].into_iter().all(is_local_name));
        assert!(!is_local_name("files.example.com"));
    }
}
