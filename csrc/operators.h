// The operators of a compiled room: schemas are in gam_fused/backends/operators.py, kernels in the room's own folder.
//
// Each verb is one template: it checks the arguments, brings them into the room's form and runs the room's kernel. Room
// is an `Operands<Room>` with
//     using Layout, List; static constexpr bool ON_CPU;
//     Layout layout() const; List list(Operand); void run(verb);  void require_state(verb, coefficients)
// List is `Tensors` for the default overload and `Tensor` for the overload `addresses`.
#pragma once

#include "arguments.h"

namespace gam {

template <class Room>
class Operands : public Lists {
 public:
  Operands(const Tensor& table, const Tensor& map, int64_t chunk, int64_t dtype)
      : Lists(table, map, chunk, dtype, Room::ON_CPU) {}

  template <class List>
  auto storage(const char* name, const List& list) {
    return self().list(Lists::storage(name, list));
  }
  template <class List>
  auto complete(const char* name, const List& list) {
    return self().list(Lists::complete(name, list));
  }
  template <class List>
  auto required(const char* name, const List& list) {
    return self().list(Lists::required(name, list));
  }
  template <class List>
  auto compute(const char* name, const List& list) {
    return self().list(Lists::compute(name, list));
  }
  template <class List>
  auto counters(const char* name, const List& list) {
    return self().list(Lists::counters(name, list));
  }

  const double* coefficients(const Tensor& t) { return coefficients_of(t, *this); }
  double* control(const Tensor& t) { return control_of(t, *this); }
  // Partial sums that this verb writes, one column for each of its chunks.
  Matrix partials(const char* name, const Tensor& t, std::initializer_list<int64_t> rows) {
    return sums_of(name, t, chunks(), rows, *this);
  }
  // Complete partial sums of all buckets, which this verb adds up.
  Matrix complete_partials(const Tensor& t, std::initializer_list<int64_t> rows) {
    return sums_of("partials", t, 1, rows, *this);
  }

 private:
  Room& self() { return static_cast<Room&>(*this); }
};

template <class Room, class List>
void squared_norm(const Tensor layout, const Tensor map, int64_t chunk, int64_t dtype, const List x, const List y,
                  const List weight, const Tensor partials) {
  Room room(layout, map, chunk, dtype);
  typename Room::SquaredNorm v = {room.layout(), room.storage("x", x), room.storage("y", y),
                                  room.storage("weight", weight), room.partials("partials", partials, {2})};
  room.run(v);
}

template <class Room, class List>
void direction_products(const Tensor layout, const Tensor map, int64_t chunk, int64_t dtype, const List x1,
                        const List x3, const List acc, const Tensor coefficients, const Tensor partials) {
  Room room(layout, map, chunk, dtype);
  const int64_t rows = partials.dim() == 2 ? partials.size(0) : 0;
  typename Room::DirectionProducts v = {room.layout(),
                                        room.storage("x1", x1),
                                        room.storage("x3", x3),
                                        room.compute("acc", acc),
                                        room.coefficients(coefficients),
                                        room.partials("partials", partials, {2, 6})};
  STD_TORCH_CHECK((rows == 6) == room.used(v.x1), "gam_fused: partials must have ", room.used(v.x1) ? 6 : 2,
                  " rows, got ", rows);
  room.run(v);
}

template <class Room, class List>
void perturb(const Tensor layout, const Tensor map, int64_t chunk, int64_t dtype, const List theta, const List base,
             const List x, const List y, const List acc, const List backup, const Tensor coefficients,
             const Tensor partials, const Tensor control, const Tensor realised, int64_t ascent, bool adaptive) {
  STD_TORCH_CHECK(ascent >= 0 && ascent <= 2, "gam_fused: ascent must be 0, 1 or 2, got ", ascent);
  Room room(layout, map, chunk, dtype);
  typename Room::Perturb v = {room.layout(),
                              room.required("theta", theta),
                              room.complete("base", base),
                              room.storage("x", x),
                              room.storage("y", y),
                              room.compute("acc", acc),
                              room.complete("backup", backup),
                              room.coefficients(coefficients),
                              room.complete_partials(partials, {2}),
                              room.control(control),
                              room.partials("realised", realised, {1}),
                              static_cast<int>(ascent),
                              adaptive};
  room.run(v);
}

template <class Room, class List>
void combined_update(const Tensor layout, const Tensor map, int64_t chunk, int64_t dtype, const List theta,
                     const List backup, const List x1, const List x3, const List acc, const List first,
                     const List second, const List third, const List steps, const Tensor coefficients,
                     const Tensor partials, const Tensor control, const Tensor direction, int64_t algorithm) {
  STD_TORCH_CHECK(algorithm == Algorithm::SGD || algorithm == Algorithm::ADAM, "gam_fused: unknown algorithm ",
                  algorithm);
  Room room(layout, map, chunk, dtype);
  typename Room::CombinedUpdate v = {room.layout(),
                                     room.required("theta", theta),
                                     room.complete("backup", backup),
                                     room.storage("x1", x1),
                                     room.storage("x3", x3),
                                     room.compute("acc", acc),
                                     room.storage("first", first),
                                     room.storage("second", second),
                                     room.storage("third", third),
                                     room.counters("steps", steps),
                                     room.coefficients(coefficients),
                                     room.complete_partials(partials, {2, 6}),
                                     room.control(control),
                                     room.partials("direction", direction, {1}),
                                     static_cast<int>(algorithm)};
  room.require_state(v);
  room.run(v);
}

template <class Room, class List>
void combine(const Tensor layout, const Tensor map, int64_t chunk, int64_t dtype, const List out, const List x1,
             const List x3, const List acc, const Tensor coefficients, const Tensor partials, const Tensor control,
             const Tensor direction) {
  Room room(layout, map, chunk, dtype);
  typename Room::Combine v = {room.layout(),
                              room.storage("out", out),
                              room.storage("x1", x1),
                              room.storage("x3", x3),
                              room.compute("acc", acc),
                              room.coefficients(coefficients),
                              room.complete_partials(partials, {2, 6}),
                              room.control(control),
                              room.partials("direction", direction, {1})};
  room.run(v);
}

template <class Room, class List>
void restore(const Tensor layout, const Tensor map, int64_t chunk, int64_t dtype, const List theta, const List backup) {
  Room room(layout, map, chunk, dtype);
  typename Room::Restore v = {room.layout(), room.required("theta", theta), room.required("backup", backup)};
  room.run(v);
}

// Registers both overloads of every verb.
template <class Room, class Library>
void register_verbs(Library& m) {
  m.impl("squared_norm", TORCH_BOX((&squared_norm<Room, Tensors>)));
  m.impl("squared_norm.addresses", TORCH_BOX((&squared_norm<Room, Tensor>)));
  m.impl("direction_products", TORCH_BOX((&direction_products<Room, Tensors>)));
  m.impl("direction_products.addresses", TORCH_BOX((&direction_products<Room, Tensor>)));
  m.impl("perturb_", TORCH_BOX((&perturb<Room, Tensors>)));
  m.impl("perturb_.addresses", TORCH_BOX((&perturb<Room, Tensor>)));
  m.impl("combined_update_", TORCH_BOX((&combined_update<Room, Tensors>)));
  m.impl("combined_update_.addresses", TORCH_BOX((&combined_update<Room, Tensor>)));
  m.impl("combine_", TORCH_BOX((&combine<Room, Tensors>)));
  m.impl("combine_.addresses", TORCH_BOX((&combine<Room, Tensor>)));
  m.impl("restore_", TORCH_BOX((&restore<Room, Tensors>)));
  m.impl("restore_.addresses", TORCH_BOX((&restore<Room, Tensor>)));
}

}  // namespace gam
