//! Panics: noted wherever they happen, for a runtime keeps those of its tasks to itself.

use std::cell::{Cell, RefCell};
use std::sync::Once;

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Notes every panic on its own thread, also those of tasks, which their runtime keeps to itself.
pub fn note_panics() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let print = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                print(info);
            }
            PANIC.with_borrow_mut(|first| _ = first.get_or_insert_with(|| info.to_string()));
        }));
    });
}

/// The first panic on this thread since it was asked for last.
pub fn take_panic() -> Option<String> {
    PANIC.take()
}

/// Whether panics on this thread are to be noted only, not printed.
pub fn be_quiet(quiet: bool) {
    QUIET.set(quiet);
}
