//! The PD half of the scheduler: what it says to the transfer link, and what it makes of the answers.

use tokio::time::Instant;

use super::Engine;
use super::job::{Abort, Finish};
use super::request::{Request, Stage};
use crate::cache::aux::AuxRow;
use crate::pd::{Chunk, Grant, ReceiveState, Role, SendState, TransferError};

impl Engine {
    /// Prefill: announces a new request's room.
    pub(super) fn open_room(&mut self, request: &mut Request) {
        let (Role::Prefill(link), Some(room)) = (&mut self.role, request.room()) else {
            return;
        };
        match link.open(room, self.limits.transfer_timeout) {
            Ok(()) => {
                request.room_open = true;
                request.stage = Stage::Bootstrapping;
            }
            Err(error) => self.fail(request, error),
        }
    }

    /// Decode: lends the request's pages to its prefill.
    pub(super) fn lend(&mut self, request: &mut Request) {
        let prompt_pages = self.pages.pages_for(request.job.prompt.len());
        let (Role::Decode(link), Some(lease)) = (&mut self.role, &request.lease) else {
            return;
        };
        let (Some(bootstrap), Some(aux)) = (request.job.bootstrap.clone(), request.aux) else {
            return;
        };
        // The room of an earlier owner must not be taken for ours.
        AuxRow::default().write(&self.ranks, aux);
        let pages = lease.pages()[lease.shared_pages()..prompt_pages].to_vec();
        let prefix_tokens = request.decode_prefix_tokens;
        let grant = Grant {
            bootstrap,
            pages,
            aux,
            prefix_tokens,
        };
        match link.receive(grant, self.limits.transfer_timeout) {
            Ok(()) => {
                request.room_open = true;
                request.stage = Stage::Receiving { lent: false };
            }
            Err(error) => self.fail(request, error),
        }
    }

    /// Moves a request on as its room does.
    pub(super) fn follow_room(&mut self, request: &mut Request) {
        let Some(room) = request.room() else { return };
        match &mut self.role {
            Role::Null => {}
            Role::Prefill(link) => {
                let state = link.poll(room);
                self.follow_send(request, state);
            }
            Role::Decode(link) => {
                let state = link.poll(room);
                self.follow_receive(request, state);
            }
        }
    }

    fn follow_send(&mut self, request: &mut Request, state: SendState) {
        match (request.stage, state) {
            (_, SendState::Failed(error)) => self.fail(request, error),
            (
                Stage::Bootstrapping,
                SendState::Granted {
                    decode_prefix_tokens: claimed,
                },
            ) => {
                let prompt = request.job.prompt.len();
                if claimed > prompt || claimed % self.page_size() != 0 {
                    let why = Abort::BadPrefix { claimed, prompt };
                    return self.end(request, Finish::Aborted(why));
                }
                request.decode_prefix_tokens = claimed;
                request.stage = Stage::Waiting;
            }
            (Stage::Inflight, SendState::Sent) => {
                self.note_speed(request);
                let token = request
                    .generated
                    .pop()
                    .expect("invariant: drawn before the last push");
                self.emit(request, token);
            }
            // Everything else is a state that we have already seen or that will be told again.
            _ => {}
        }
    }

    fn follow_receive(&mut self, request: &mut Request, state: ReceiveState) {
        if !matches!(request.stage, Stage::Receiving { .. }) {
            return;
        }
        match state {
            ReceiveState::Bootstrapping => {}
            ReceiveState::Transferring => request.stage = Stage::Receiving { lent: true },
            ReceiveState::Failed(error) => self.fail(request, error),
            ReceiveState::Received => self.accept(request),
        }
    }

    /// The KV has arrived: checks that every rank received this room's row, and continues from its token.
    fn accept(&mut self, request: &mut Request) {
        let (Some(room), Some(slot)) = (request.room(), request.aux) else {
            return;
        };
        let rows: Vec<AuxRow> = self.ranks.iter().map(|r| AuxRow::read(r, slot)).collect();
        self.close_room(request);
        if let Some(wrong) = rows.iter().find(|row| row.room != room.number()) {
            let why = Abort::Corrupted {
                expected: room.number(),
                found: wrong.room,
            };
            return self.end(request, Finish::Aborted(why));
        }
        request.computed = request.job.prompt.len();
        request.cached_tokens = rows[0].cached_tokens as usize;
        self.totals.cached_tokens += u64::from(rows[0].cached_tokens);
        request.stage = Stage::Decoding;
        self.emit(request, rows[0].first_token);
    }

    /// Prefill: pushes the pages that are complete and not pushed yet. With the first token (the prompt is computed)
    /// it is the last push, and takes the unfilled page and the aux row along.
    pub(super) fn push_ready(&mut self, request: &mut Request, first_token: Option<u32>) {
        let prompt_pages = self.pages.pages_for(request.job.prompt.len());
        let page_size = self.page_size();
        let (Role::Prefill(link), Some(lease)) = (&mut self.role, &request.lease) else {
            return;
        };
        let (Some(room), Some(slot)) = (request.room(), request.aux) else {
            return;
        };
        let ready = if first_token.is_some() {
            prompt_pages
        } else {
            request.computed / page_size
        };
        let start = request.decode_prefix_tokens / page_size + request.pushed_pages;
        if ready <= start && first_token.is_none() {
            return;
        }
        if let Some(first_token) = first_token {
            let cached_tokens = u32::try_from(request.cached_tokens).unwrap_or(u32::MAX);
            AuxRow {
                first_token,
                cached_tokens,
                room: room.number(),
            }
            .write(&self.ranks, slot);
            request.generated.push(first_token);
            request.stage = Stage::Inflight;
        }
        let chunk = Chunk {
            first_page: request.pushed_pages,
            pages: lease.pages()[start..ready.max(start)].to_vec(),
            last: first_token.map(|_| slot),
        };
        request.pushed_pages += chunk.pages.len();
        request.first_push.get_or_insert_with(Instant::now);
        if let Err(error) = link.push(room, chunk) {
            self.fail(request, error);
        }
    }

    /// Ends a request whose transfer failed. The token drawn for the other side is not output.
    fn fail(&mut self, request: &mut Request, error: TransferError) {
        if request.stage == Stage::Inflight {
            request.generated.clear();
        }
        self.end(request, Finish::Aborted(Abort::Transfer(error)));
    }

    /// Tells the link that nobody wants the room any more. Harmless if it has ended.
    pub(super) fn cancel_room(&mut self, request: &Request) {
        if self.room_is_terminal(request) {
            return;
        }
        let Some(room) = request.room() else { return };
        match &mut self.role {
            Role::Null => {}
            Role::Prefill(link) => link.cancel(room),
            Role::Decode(link) => link.cancel(room),
        }
    }

    /// Whether no byte of the request's room can move any more; closes the room then.
    pub(super) fn room_is_quiet(&mut self, request: &mut Request) -> bool {
        let quiet = self.room_is_terminal(request);
        if quiet {
            self.close_room(request);
        }
        quiet
    }

    fn room_is_terminal(&mut self, request: &Request) -> bool {
        let (true, Some(room)) = (request.room_open, request.room()) else {
            return true;
        };
        match &mut self.role {
            Role::Null => true,
            Role::Prefill(link) => {
                matches!(link.poll(room), SendState::Sent | SendState::Failed(_))
            }
            Role::Decode(link) => {
                matches!(
                    link.poll(room),
                    ReceiveState::Received | ReceiveState::Failed(_)
                )
            }
        }
    }

    fn close_room(&mut self, request: &mut Request) {
        let (true, Some(room)) = (request.room_open, request.room()) else {
            return;
        };
        match &mut self.role {
            Role::Null => {}
            Role::Prefill(link) => link.close(room),
            Role::Decode(link) => link.close(room),
        }
        request.room_open = false;
    }

    /// Remembers how fast the last room went.
    fn note_speed(&mut self, request: &Request) {
        let Some(first_push) = request.first_push else {
            return;
        };
        let seconds = first_push.elapsed().as_secs_f64();
        let page_bytes: usize = self
            .ranks
            .iter()
            .map(|r| r.shape.first_aux_entry() * r.shape.page_bytes())
            .sum();
        #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
        let bytes = (request.pushed_pages * page_bytes) as f64;
        self.totals.transfer_latency_ms = seconds * 1e3;
        self.totals.transfer_speed_gb_s = bytes / seconds.max(1e-9) / 1e9;
    }
}
