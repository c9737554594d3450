//! Progress while nothing else is said: a long step must not look like silence.

use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use ingle_protocol::wire::Answer;
use ingle_protocol::wire::v2::Progress;
use tokio::sync::mpsc;

use crate::snapshot::lock;

/// How often the hearts are looked at.
const TICK: Duration = Duration::from_millis(50);
/// Said again after this long; together with the tick below the protocol's 250 ms.
const REPEAT: Duration = Duration::from_millis(150);
/// Changes are not said more often than this.
const AT_MOST: Duration = Duration::from_millis(50);

/// What one answer says of its progress, until its first token.
#[derive(Debug)]
pub(crate) struct Heart {
    sender: mpsc::Sender<Answer>,
    beat: Mutex<Beat>,
}

#[derive(Debug)]
struct Beat {
    progress: Option<Progress>,
    said: Option<Instant>,
}

impl Heart {
    pub fn new(sender: mpsc::Sender<Answer>) -> Self {
        Self { sender, beat: Mutex::new(Beat { progress: None, said: None }) }
    }

    /// For frames other than progress.
    pub fn sender(&self) -> &mpsc::Sender<Answer> {
        &self.sender
    }

    /// Notes how far it is and says so, unless it has just said something.
    pub fn set(&self, progress: Progress) {
        let mut beat = lock(&self.beat);
        if beat.progress != Some(progress) {
            beat.progress = Some(progress);
            self.say(&mut beat, AT_MOST);
        }
    }

    /// No progress from now on: the tokens come. When this returns, none is on its way either.
    pub fn hush(&self) {
        lock(&self.beat).progress = None;
    }

    fn say(&self, beat: &mut Beat, after: Duration) {
        let now = Instant::now();
        if let Some(progress) = beat.progress
            && beat.said.is_none_or(|said| now.duration_since(said) >= after)
        {
            // A full channel is a reader that is not waiting for news.
            let _ = self.sender.try_send(Answer::Progress(progress));
            beat.said = Some(now);
        }
    }
}

/// The hearts of all answers that are waiting for their first token.
#[derive(Debug, Default)]
pub(crate) struct Hearts {
    list: Mutex<(Vec<Weak<Heart>>, bool)>,
    changed: Condvar,
}

impl Hearts {
    pub fn add(&self, heart: &Arc<Heart>) {
        lock(&self.list).0.push(Arc::downgrade(heart));
        self.changed.notify_one();
    }

    /// Ends the thread.
    pub fn close(&self) {
        lock(&self.list).1 = true;
        self.changed.notify_one();
    }
}

/// The body of the heartbeat's thread. It sleeps while there is nobody to speak for.
pub(super) fn run(hearts: &Hearts) {
    let mut list = lock(&hearts.list);
    loop {
        while list.0.is_empty() && !list.1 {
            list = hearts.changed.wait(list).unwrap_or_else(PoisonError::into_inner);
        }
        if list.1 {
            return;
        }
        list.0.retain(|heart| {
            let Some(heart) = heart.upgrade() else { return false };
            let mut beat = lock(&heart.beat);
            heart.say(&mut beat, REPEAT);
            // Progress is set before the heart is added, so without any the tokens have begun.
            beat.progress.is_some()
        });
        list = hearts.changed.wait_timeout(list, TICK).unwrap_or_else(PoisonError::into_inner).0;
    }
}
