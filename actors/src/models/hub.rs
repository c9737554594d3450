//! A file behind HTTPS as a source, with ranges: one of a model hub
//! (`{base}/{repository}/resolve/{revision}/{file}`), or at any other address.

use std::ops::Range;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt, stream};
use reqwest::header::{ACCEPT_ENCODING, CONTENT_RANGE, ETAG, HeaderMap, IF_RANGE, RANGE};
use reqwest::{Client, Response, StatusCode, Url};
use tokio::time::{Instant, timeout};

use super::client::{in_words, is_allowed, source_client};
use super::lookup::{host_of, is_local_name};
use super::source::{Body, Job, RemoteFile, Source, SourceError};

/// Longest wait for the first answer of a hub, redirects included: one that does not answer is given up soon.
const FIRST_ANSWER: Duration = Duration::from_secs(10);

/// The least that must come in a second: what is slower would take a month for a gigabyte.
const SLOWEST: u64 = 512;
/// The longest time for one fetch; what came is gone on with the next time.
const LONGEST: Duration = Duration::from_secs(24 * 3600);
/// Files of unknown size may be as large as this.
const LARGEST: u64 = 512 << 30;

/// One file of a hub.
#[derive(Debug, Clone)]
pub(super) struct HubSource {
    client: Client,
    url: Url,
    /// The address as it may be shown: without a name and password.
    shown: String,
    stall: Duration,
}

impl HubSource {
    pub(super) fn new(
        base: &str,
        is_named: bool,
        repository: &str,
        revision: &str,
        file: &str,
        stall: Duration,
    ) -> Result<Self, SourceError> {
        let mut url: Url = base.parse().map_err(|error| {
            SourceError::NotAvailable(format!("the hub's address (INGLE_HUB_URL) is no URL: {error}"))
        })?;
        if !is_allowed(&url) {
            return Err(SourceError::NotAvailable(
                "the hub's address (INGLE_HUB_URL) must begin with https:// (plain http only within this machine)"
                    .into(),
            ));
        }
        let path = format!("{}/{repository}/resolve/{revision}/{file}", url.path().trim_end_matches('/'));
        url.set_path(&path);
        let named = is_named.then(|| host_of(&url));
        Self::at(url, named, stall)
    }

    /// A file at the address that the user typed.
    pub(super) fn of_url(url: &str, stall: Duration) -> Result<Self, SourceError> {
        let url: Url =
            url.parse().map_err(|error| SourceError::NotAvailable(format!("its address is no URL: {error}")))?;
        if !is_allowed(&url) {
            let why = "its address must begin with https:// (plain http only within this machine)";
            return Err(SourceError::NotAvailable(why.into()));
        }
        // Who types an address of the household means it; a public name that leads there is not what he typed.
        let named = Some(host_of(&url)).filter(|host| is_local_name(host));
        Self::at(url, named, stall)
    }

    fn at(url: Url, named: Option<String>, stall: Duration) -> Result<Self, SourceError> {
        let mut shown = url.clone();
        let _ = (shown.set_username(""), shown.set_password(None));
        shown.set_query(None);
        Ok(Self { client: source_client(&url, named)?, url, shown: shown.into(), stall })
    }

    /// Sends a request; an answer without the file is an error that says which address answered what.
    async fn get(&self, headers: HeaderMap, limit: Duration) -> Result<Response, SourceError> {
        let request = self.client.get(self.url.clone()).header(ACCEPT_ENCODING, "identity").headers(headers);
        let response = match timeout(limit, request.send()).await {
            Err(_) => {
                let why = format!("{} gave no answer within {} s", self.host(), limit.as_secs_f32());
                return Err(SourceError::Unreachable(why));
            }
            Ok(Err(error)) if error.is_redirect() => {
                return Err(SourceError::Refused(format!("{}: {}", self.shown, in_words(&error))));
            }
            Ok(Err(error)) => {
                return Err(SourceError::Unreachable(format!("{}: {}", self.host(), in_words(&error))));
            }
            Ok(Ok(response)) => response,
        };
        match response.status() {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT => Ok(response),
            StatusCode::NOT_FOUND => Err(SourceError::Refused(format!("has no such file (404): {}", self.shown))),
            status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
                Err(SourceError::Unreachable(format!("{} answered {status}; try again later", self.shown)))
            }
            status => Err(SourceError::Refused(format!("{} answered {status}", self.shown))),
        }
    }

    fn host(&self) -> &str {
        self.url.host_str().unwrap_or_default()
    }
}

impl Source for HubSource {
    fn resolve<'a>(&'a self, job: &'a Job<'a>) -> BoxFuture<'a, Result<Box<dyn RemoteFile>, SourceError>> {
        async move {
            // Not HEAD: signed addresses behind a redirect are often good for GET only.
            let response = self.get(range_header(0..1)?, FIRST_ANSWER).await?;
            let ranges = response.status() == StatusCode::PARTIAL_CONTENT;
            let size = if ranges {
                let range = content_range(&response)?;
                (range.first == 0).then_some(range.total)
            } else {
                response.content_length()
            };
            let size = size.or(job.expected_size).ok_or_else(|| {
                SourceError::Refused(format!("{} does not say how long the file is, and nobody knows it", self.shown))
            })?;
            let most = job.expected_size.unwrap_or(LARGEST);
            if size > most && job.expected_size.is_none() {
                let why = format!("{} has {size} bytes, more than the {most} that are allowed", self.shown);
                return Err(SourceError::Refused(why));
            }
            // A weak tag does not promise equal bytes.
            let tag = response.headers().get(ETAG).and_then(|tag| tag.to_str().ok());
            let tag = tag.filter(|tag| ranges && tag.starts_with('"')).map(str::to_owned);
            Ok(Box::new(HubFile { hub: self.clone(), size, tag }) as Box<dyn RemoteFile>)
        }
        .boxed()
    }
}

struct HubFile {
    hub: HubSource,
    size: u64,
    tag: Option<String>,
}

impl RemoteFile for HubFile {
    fn size(&self) -> u64 {
        self.size
    }

    fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    fn fetch<'a>(&'a self, range: Range<u64>) -> BoxFuture<'a, Result<Body, SourceError>> {
        async move {
            let mut headers = HeaderMap::new();
            if range.start > 0 {
                headers = range_header(range.clone())?;
                let tag = self.tag.as_deref().unwrap_or_default().parse();
                headers.insert(IF_RANGE, tag.map_err(|_| SourceError::Refused("bad ETag".into()))?);
            }
            let response = self.hub.get(headers, self.hub.stall.max(FIRST_ANSWER)).await?;
            let start = match response.status() {
                StatusCode::PARTIAL_CONTENT => {
                    let got = content_range(&response)?;
                    if got.first != range.start || got.last.checked_add(1) != Some(range.end) || got.total != self.size
                    {
                        return Err(SourceError::Refused(format!(
                            "{} answered with bytes {}-{} of {} where {}-{} of {} were asked for",
                            self.hub.url,
                            got.first,
                            got.last,
                            got.total,
                            range.start,
                            range.end.saturating_sub(1),
                            self.size
                        )));
                    }
                    range.start
                }
                _ => 0,
            };
            if let Some(length) = response.content_length()
                && Some(length) != self.size.checked_sub(start)
            {
                return Err(SourceError::WrongSize { got: start.saturating_add(length), expected: self.size });
            }
            let now = Instant::now();
            let (stall, total) = (self.hub.stall, self.size);
            let reading = Reading { response, done: start, total, stall, begin: now, window: (now, start) };
            Ok(Body { start, bytes: stream::try_unfold(reading, Reading::next).boxed() })
        }
        .boxed()
    }
}

struct Reading {
    response: Response,
    done: u64,
    total: u64,
    stall: Duration,
    begin: Instant,
    /// Since when the speed is looked at, and what was here then.
    window: (Instant, u64),
}

impl Reading {
    async fn next(mut self) -> Result<Option<(bytes::Bytes, Self)>, SourceError> {
        let (done, total) = (self.done, self.total);
        let chunk = timeout(self.stall, self.response.chunk())
            .await
            .map_err(|_| SourceError::Stalled { after: self.stall })?
            .map_err(|error| SourceError::Cut { done, total, why: in_words(&error) })?;
        match chunk {
            None if done < total => Err(SourceError::Cut { done, total, why: "the server said that was all".into() }),
            None => Ok(None),
            Some(chunk) => {
                self.done = done.saturating_add(chunk.len() as u64);
                if self.done > total {
                    return Err(SourceError::WrongSize { got: self.done, expected: total });
                }
                self.check_speed()?;
                Ok(Some((chunk, self)))
            }
        }
    }
}

impl Reading {
    /// A server that sends a byte now and then is as good as silent.
    fn check_speed(&mut self) -> Result<(), SourceError> {
        if self.begin.elapsed() > LONGEST {
            return Err(SourceError::TooLong { limit: LONGEST, done: self.done, total: self.total });
        }
        let (since, before) = self.window;
        let within = since.elapsed();
        if within >= self.stall && self.done < self.total {
            let (bytes, least) = (self.done - before, (SLOWEST as f64 * within.as_secs_f64()) as u64);
            if bytes < least {
                return Err(SourceError::TooSlow { bytes, within, least });
            }
            self.window = (Instant::now(), self.done);
        }
        Ok(())
    }
}

fn range_header(range: Range<u64>) -> Result<HeaderMap, SourceError> {
    let value = format!("bytes={}-{}", range.start, range.end.saturating_sub(1));
    let value = value.parse().map_err(|_| SourceError::Refused(format!("bad range {value}")))?;
    Ok(HeaderMap::from_iter([(RANGE, value)]))
}

struct ContentRange {
    first: u64,
    last: u64,
    total: u64,
}

/// `bytes first-last/total`, all three given and in order.
fn content_range(response: &Response) -> Result<ContentRange, SourceError> {
    let text = response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    parse_content_range(text).ok_or_else(|| {
        // Its host only: the rest of a redirect's address may be a signature.
        let host = response.url().host_str().unwrap_or_default();
        SourceError::Refused(format!("{host} answered a part of the file with a Content-Range of {text:?}"))
    })
}

fn parse_content_range(text: &str) -> Option<ContentRange> {
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let range = ContentRange { first: first.parse().ok()?, last: last.parse().ok()?, total: total.parse().ok()? };
    (range.first <= range.last && range.last < range.total).then_some(range)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_content_range_counts() {
        let range = parse_content_range("bytes 5-9/10").unwrap();
        assert_eq!((range.first, range.last, range.total), (5, 9, 10));
        for bad in ["", "bytes */10", "bytes 5-9/*", "bytes 9-5/10", "bytes 5-10/10", "5-9/10", "bytes -1-9/10"] {
            assert!(parse_content_range(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn a_hub_in_plain_text_is_refused_before_anything_is_sent() {
        let error = HubSource::new("http://hub.example", true, "a/b", "c", "d", FIRST_ANSWER).unwrap_err();
        assert!(error.to_string().contains("must begin with https://"), "{error}");
        let mirror = HubSource::new("https://mirror.example/hf/", true, "a/b", "c", "d e.gguf", FIRST_ANSWER).unwrap();
        assert_eq!(mirror.url.as_str(), "https://mirror.example/hf/a/b/resolve/c/d%20e.gguf");
    }
}
