//! What programs say to a node, with every answer held to its format.

use reqwest::header::HeaderMap;
use serde_json::Value;

use super::{DEADLINE, Machine, until_or};

/// An HTTP client that keeps no connections (nodes come and go here).
pub fn client() -> reqwest::Client {
    // Somebody else may have installed the same one.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy().pool_max_idle_per_host(0).build().unwrap()
}

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Value,
}

impl Answer {
    pub(super) async fn of(response: reqwest::Response) -> Self {
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        assert!(headers["x-request-id"].to_str().unwrap().starts_with("req_"), "{headers:?}");
        let text = tokio::time::timeout(4 * DEADLINE, response.text()).await.expect("an answer ends").unwrap();
        let body = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{status} {error}: {text}"));
        Self { status, headers, body }
    }

    /// The text of a completion, where all went well.
    #[track_caller]
    pub fn text(&self) -> &str {
        assert_eq!(self.status, 200, "{}", self.body);
        self.body["choices"][0]["message"]["content"].as_str().expect("a completion has a text")
    }

    /// Name of the node that answered.
    pub fn node(&self) -> &str {
        self.headers.get("x-ingle-node").map_or("", |node| node.to_str().unwrap())
    }

    /// `code` of the error.
    pub fn code(&self) -> &str {
        self.body["error"]["code"].as_str().unwrap_or_default()
    }

    /// What the error says.
    pub fn message(&self) -> &str {
        self.body["error"]["message"].as_str().unwrap_or_default()
    }

    /// It is "not now", and says when to come again.
    #[track_caller]
    pub fn is_not_now(&self) {
        assert_eq!(self.status, 503, "{}", self.body);
        let wait: u32 = self.headers["retry-after"].to_str().unwrap().parse().expect("whole seconds");
        assert!(wait > 0);
    }
}

impl Machine {
    /// `GET path`.
    pub async fn get(&self, path: &str) -> Answer {
        Answer::of(client().get(self.url(path)).send().await.unwrap()).await
    }

    /// Asks for a completion with headers.
    pub async fn ask_with(&self, body: &Value, headers: &[(&str, &str)]) -> Answer {
        let mut request = client().post(self.url("/v1/chat/completions")).json(body);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        Answer::of(request.send().await.unwrap()).await
    }

    /// Asks for a completion.
    pub async fn ask(&self, body: &Value) -> Answer {
        let request = client().post(self.url("/v1/chat/completions")).json(body);
        Answer::of(request.send().await.unwrap()).await
    }

    /// Sends these bytes as a request for a completion.
    pub async fn send_raw(&self, body: String) -> Answer {
        let request = client().post(self.url("/v1/chat/completions")).header("content-type", "application/json");
        Answer::of(request.body(body).send().await.unwrap()).await
    }

    /// Asks until it answers; until then it may not know the model, as a node that has just started does.
    pub async fn ask_until_known(&self, body: &Value) -> Answer {
        self.ask_again_and_again(body, |answer| assert!(matches!(answer.status, 404 | 503), "{}", answer.body)).await
    }

    /// Asks until it answers; before that it may say "not now" and nothing else.
    pub async fn ask_until_answered(&self, body: &Value) -> Answer {
        self.ask_again_and_again(body, Answer::is_not_now).await
    }

    async fn ask_again_and_again(&self, body: &Value, check: impl Fn(&Answer)) -> Answer {
        let mut last = Value::Null;
        let mut ask = async || {
            let answer = self.ask(body).await;
            if answer.status != 200 {
                check(&answer);
                last = answer.body;
                return None;
            }
            Some(answer)
        };
        let found = until_or(DEADLINE, &mut ask).await;
        found.unwrap_or_else(|| panic!("{}: no answer within {DEADLINE:?}, but {last}", self.name))
    }

    /// Asks for a stream whose model may have to be loaded first: who answers is not known when it begins.
    pub async fn stream_when_ready(&self, body: &Value) -> Events {
        let mut body = body.clone();
        body["stream"] = true.into();
        let response = client().post(self.url("/v1/chat/completions")).json(&body).send().await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream; charset=utf-8");
        Events { response, buffer: Vec::new(), node: String::new(), seen: Streamed::default() }
    }

    /// Asks for a stream and returns when it has begun.
    pub async fn stream(&self, body: &Value) -> Events {
        let mut body = body.clone();
        body["stream"] = true.into();
        let response = client().post(self.url("/v1/chat/completions")).json(&body).send().await.unwrap();
        if response.status() != 200 {
            let answer = Answer::of(response).await;
            panic!("no stream: {} {}", answer.status, answer.body);
        }
        assert_eq!(response.headers()["content-type"], "text/event-stream; charset=utf-8");
        assert!(response.headers().contains_key("x-request-id"));
        let node = response.headers()["x-ingle-node"].to_str().unwrap().to_owned();
        Events { response, buffer: Vec::new(), node, seen: Streamed::default() }
    }
}

/// A stream that runs. Dropping it is what a client does that leaves.
#[derive(Debug)]
pub struct Events {
    response: reqwest::Response,
    buffer: Vec<u8>,
    /// Name of the node that answers.
    pub node: String,
    seen: Streamed,
}

/// What a stream said so far.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Streamed {
    pub text: String,
    /// Every piece of the text that is not empty.
    pub deltas: Vec<String>,
    pub finish_reason: Option<String>,
    pub usage: Option<Value>,
    /// Calls of tools, whole.
    pub tool_calls: Vec<Value>,
    /// Entries of `logprobs`, of all chunks.
    pub logprobs: Vec<Value>,
    /// All chunks as they came.
    pub chunks: Vec<Value>,
    /// The error event.
    pub error: Option<Value>,
    /// `[DONE]` came.
    pub done: bool,
    id: Option<Value>,
}

impl Events {
    /// Waits until so much text has come.
    pub async fn until_text(mut self, bytes: usize) -> Self {
        while self.seen.text.len() < bytes {
            assert!(self.more().await, "the stream ended too soon: {:?}", self.seen);
        }
        self
    }

    /// Waits for the first piece of text.
    pub async fn begun(mut self) -> Self {
        while self.seen.text.is_empty() {
            assert!(self.more().await, "the stream ended before its first token: {:?}", self.seen);
        }
        self
    }

    /// Everything up to the end.
    pub async fn rest(mut self) -> Streamed {
        while self.more().await {}
        assert!(self.buffer.is_empty(), "half an event at the end: {:?}", String::from_utf8_lossy(&self.buffer));
        self.seen
    }

    /// One more piece from the socket; false at the end.
    async fn more(&mut self) -> bool {
        let piece = tokio::time::timeout(DEADLINE, self.response.chunk()).await;
        let piece = piece.unwrap_or_else(|_| panic!("the stream is silent after {:?}", self.seen));
        let Some(bytes) = piece.unwrap_or_else(|error| panic!("the stream broke ({error}) after {:?}", self.seen))
        else {
            return false;
        };
        self.buffer.extend_from_slice(&bytes);
        while let Some(end) = self.buffer.windows(2).position(|pair| pair == b"\n\n") {
            let event: Vec<u8> = self.buffer.drain(..end + 2).collect();
            self.seen.take(std::str::from_utf8(&event[..end]).expect("an event is UTF-8"));
        }
        true
    }
}

impl Streamed {
    /// Takes one event, held to the format.
    fn take(&mut self, event: &str) {
        if event.starts_with(':') {
            return;
        }
        assert!(!self.done && self.error.is_none(), "an event behind the end: {event}");
        let data = event.strip_prefix("data: ").unwrap_or_else(|| panic!("not an event: {event:?}"));
        if data == "[DONE]" {
            assert!(self.finish_reason.is_some(), "[DONE] without a finish reason");
            self.done = true;
            return;
        }
        let chunk: Value = serde_json::from_str(data).unwrap_or_else(|error| panic!("{error}: {data}"));
        if chunk.get("error").is_some() {
            self.error = Some(chunk["error"].clone());
            return;
        }
        assert_eq!(chunk["object"], "chat.completion.chunk");
        assert_eq!(*self.id.get_or_insert_with(|| chunk["id"].clone()), chunk["id"], "all chunks have one id");
        self.chunks.push(chunk.clone());
        match chunk["choices"].as_array().unwrap().as_slice() {
            [] => self.usage = Some(chunk["usage"].clone()),
            [choice] => {
                assert!(self.finish_reason.is_none(), "a choice behind the finish reason: {chunk}");
                assert_eq!(choice["index"], 0);
                self.finish_reason = choice["finish_reason"].as_str().map(str::to_owned);
                self.logprobs.extend(choice["logprobs"]["content"].as_array().into_iter().flatten().cloned());
                self.tool_calls.extend(choice["delta"]["tool_calls"].as_array().into_iter().flatten().cloned());
                match choice["delta"]["content"].as_str() {
                    None | Some("") => {}
                    Some(text) => {
                        self.text += text;
                        self.deltas.push(text.to_owned());
                    }
                }
            }
            more => panic!("{} choices: {chunk}", more.len()),
        }
    }

    /// It broke off with an error of this code, and not as if it were whole.
    #[track_caller]
    pub fn broke_with(&self, code: &str) {
        let error = self.error.as_ref().unwrap_or_else(|| panic!("no error event: {self:?}"));
        assert_eq!(error["code"], code, "{error}");
        assert_eq!(error["type"], "server_error", "{error}");
        assert!(!error["message"].as_str().unwrap().is_empty());
        assert!(!self.done && self.finish_reason.is_none(), "{self:?}");
    }

    /// It came to its end and said this.
    #[track_caller]
    pub fn is_whole(&self, text: &str) {
        assert!(self.done, "no [DONE]: {self:?}");
        assert_eq!(self.text, text);
    }
}
