//! What a task of the store's side does, recorded where it is done.
//!
//! A task that carries out work for a volume is given a [`Recording`]; whatever it calls opens spans in it ([`open`])
//! without being told of it. Without one, nothing is recorded.

use std::sync::Arc;

use parking_lot::Mutex;

use super::SPANS_MAX;
use super::span::{Span, Step, Trail, Value, notes};
use crate::clock::now_ns;

tokio::task_local! {
    static RECORDING: Recording;
}

/// Longest text that is noted, in characters: a store's words for an error may be a page.
const TEXT_CHARS_MAX: usize = 200;

/// The spans of the task at hand. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Recording(Arc<Mutex<Trail>>);

impl Recording {
    /// Of so much work, which begins now.
    pub(crate) fn begin(step: Step, count: u64) -> Self {
        let whole = Span::new(step, now_ns(), u64::MAX);
        let spans = vec![whole.with(notes::COUNT, Value::Count(count))];
        Self(Arc::new(Mutex::new(Trail { spans, left_out: 0 })))
    }

    /// Does the work, which is recorded.
    pub(crate) async fn over<F: Future>(self, work: F) -> F::Output {
        RECORDING.scope(self, work).await
    }

    fn add(&self, span: Span) -> Option<u16> {
        let mut trail = self.0.lock();
        // Empty: it was taken.
        if trail.spans.is_empty() || trail.spans.len() >= SPANS_MAX {
            trail.left_out += 1;
            return None;
        }
        let place = u16::try_from(trail.spans.len()).ok()?;
        trail.spans.push(span);
        Some(place)
    }
}

/// What the task at hand has recorded so far, which ends with that; none: it is not recorded.
pub(crate) fn taken() -> Option<Trail> {
    let taken = RECORDING.try_with(|recording| {
        let mut trail = std::mem::take(&mut *recording.0.lock());
        let now_ns = now_ns();
        for span in &mut trail.spans {
            // What goes on is nobody's to wait for.
            span.end_ns = span.end_ns.min(now_ns).max(span.begin_ns);
        }
        trail
    });
    taken.ok().filter(|trail| !trail.spans.is_empty())
}

/// Opens a span of the task at hand, below `parent`, or the whole. It ends when what is answered is dropped.
pub(crate) fn open(step: Step, parent: Option<&Open>) -> Open {
    let opened = RECORDING.try_with(|recording| {
        let mut span = Span::new(step, now_ns(), u64::MAX);
        span.parent = Some(parent.and_then(Open::place).unwrap_or(0));
        let place = recording.add(span)?;
        Some((recording.clone(), place))
    });
    Open(opened.ok().flatten())
}

/// A span that goes on; nothing, where nothing is recorded.
#[derive(Debug, Default)]
pub(crate) struct Open(Option<(Recording, u16)>);

impl Open {
    fn place(&self) -> Option<u16> {
        self.0.as_ref().map(|(_, place)| *place)
    }

    /// Whether it is recorded: what is costly to note need not be made otherwise.
    pub(crate) const fn is_recorded(&self) -> bool {
        self.0.is_some()
    }

    fn change(&self, change: impl FnOnce(&mut Span)) {
        if let Some((recording, place)) = &self.0
            && let Some(span) = recording.0.lock().spans.get_mut(usize::from(*place))
        {
            change(span);
        }
    }

    /// Notes a word.
    pub(crate) fn word(&self, name: &'static str, word: &'static str) {
        self.change(|span| span.notes.push((name, Value::Word(word))));
    }

    /// Notes a number.
    pub(crate) fn count(&self, name: &'static str, count: u64) {
        self.change(|span| span.notes.push((name, Value::Count(count))));
    }

    /// Notes a text, or its beginning.
    pub(crate) fn text(&self, name: &'static str, text: &str) {
        self.change(|span| {
            let text = text.chars().take(TEXT_CHARS_MAX).collect();
            span.notes.push((name, Value::Text(text)));
        });
    }

    /// It failed, for this reason.
    pub(crate) fn fail(&self, why: &'static str) {
        self.word(notes::ERROR_TYPE, why);
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.change(|span| span.end_ns = now_ns());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn spans_of_what_a_task_calls_are_recorded_below_their_parents() {
        let recording = Recording::begin(Step::Fetch, 1);
        let work = async {
            let call = open(Step::Decode, None);
            call.text(notes::OBJECT, &"ä".repeat(300));
            let side_by_side = ["a", "b"].map(|_| async {
                let attempt = open(Step::Attempt, Some(&call));
                tokio::task::yield_now().await;
                attempt.fail("unavailable");
            });
            futures::future::join_all(side_by_side).await;
            drop(call);
            let _goes_on = open(Step::Joined, None);
            taken().unwrap()
        };
        let trail = recording.over(work).await;
        let steps: Vec<_> = trail.spans.iter().map(|s| (s.step, s.parent)).collect();
        assert_eq!(
            steps,
            [
                (Step::Fetch, None),
                (Step::Decode, Some(0)),
                (Step::Attempt, Some(1)),
                (Step::Attempt, Some(1)),
                (Step::Joined, Some(0)),
            ]
        );
        assert_eq!(trail.whole().step, Step::Fetch);
        assert!(
            trail
                .spans
                .iter()
                .all(|s| s.begin_ns <= s.end_ns && s.end_ns <= now_ns())
        );
        let Value::Text(text) = &trail.spans[1].notes[0].1 else {
            panic!("{trail:?}")
        };
        assert_eq!(text.chars().count(), TEXT_CHARS_MAX);
        assert_eq!(
            trail.spans[2].notes,
            [(notes::ERROR_TYPE, Value::Word("unavailable"))]
        );
    }

    #[tokio::test]
    async fn spans_past_the_most_are_counted_and_what_is_below_them_is_below_the_whole() {
        let recording = Recording::begin(Step::Fetch, 1);
        let trail = recording.over(async {
            for _ in 0..SPANS_MAX + 4 {
                let call = open(Step::Decode, None);
                drop(open(Step::Attempt, Some(&call)));
            }
            taken().unwrap()
        });
        let trail = trail.await;
        assert_eq!(trail.spans.len(), SPANS_MAX);
        assert_eq!(
            trail.left_out as usize,
            2 * (SPANS_MAX + 4) - (SPANS_MAX - 1)
        );
    }

    #[test]
    fn nothing_is_recorded_outside_of_a_task_that_is() {
        let nothing = open(Step::Decode, None);
        assert!(!nothing.is_recorded() && taken().is_none());
        nothing.count(notes::BYTES, 1);
    }
}
